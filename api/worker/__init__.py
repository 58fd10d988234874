"""The process that owns one device. Started by module name; spoken to in ``schema.messages``."""
