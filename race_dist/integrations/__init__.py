"""Adapters for other training frameworks: one package per framework, each imported on its own."""
