"""The destination side: the only place that knows the order of an incoming migration."""
