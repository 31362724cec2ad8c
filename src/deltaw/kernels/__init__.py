"""Bare tensor functions: what costs time and memory, written once and tested against the plain formula."""
