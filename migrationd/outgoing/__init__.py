"""The source side: the only place that knows the order of an outgoing migration."""
