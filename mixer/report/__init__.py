"""Numbers -> tables and figures."""
