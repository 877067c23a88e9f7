"""Scripts that print a table."""

import steps  # noqa: F401 - what it sets counts before torch is loaded
