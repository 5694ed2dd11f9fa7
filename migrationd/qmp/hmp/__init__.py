"""The human monitor: commands in words, as ``human-monitor-command`` performs them.

Pure but for the QMP commands that it performs through an interface.
"""
