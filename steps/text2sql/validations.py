"""When a training is validated, and on how many rows."""

import math

MOST = 3
ROWS = 64


def interval(steps: int) -> int:
    """Steps from one validation to the next; there is one after the last step too."""
    return math.ceil(steps / MOST)


def count(steps: int) -> int:
    """Validations of a training of so many steps."""
    return math.ceil(steps / interval(steps))


def rows(*, steps: int, batch_size: int) -> int:
    """Rows of a validation: 64, or in short trainings so few that validating costs less than training."""
    return min(ROWS, max(8, steps * batch_size // 8))
