"""Tenants: their keys, limits, fair shares and usage."""
