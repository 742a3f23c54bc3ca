"""Run folders -> tables and figures."""
