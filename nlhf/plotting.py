"""Figures: log-log, colour-blind-safe, and told apart in grey by dashes and markers as well."""
from __future__ import annotations
