"""Byte channels and addresses; knows no format."""
