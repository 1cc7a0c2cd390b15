"""Profilers: they measure a device. They know no model and no engine."""
