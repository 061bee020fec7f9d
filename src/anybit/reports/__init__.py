"""Runs for readers: pages, figures, terminal tables, explanations. Imports supernets and below."""
