"""Commands, returns, types and events as pydantic models: the single source of QMP."""
