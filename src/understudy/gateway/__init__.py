"""The data plane: HTTP in, route, upstream, stream, record."""
