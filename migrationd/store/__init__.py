"""A guest at rest: files on disk, nothing about migration."""
