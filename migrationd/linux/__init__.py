"""One file for each kernel interface: numbers, structs, thin calls."""
