"""The monitor: reader, session, dispatch, handlers, event bus."""
