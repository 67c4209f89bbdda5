"""What the package logs inside a block."""

import contextlib
import logging
import re


@contextlib.contextmanager
def logs(match):
    """Gives the list of messages of warnings and errors, one of which has to match; None: there may be none."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("happyhorse_fast")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
    if match is None:
        assert messages == []
    else:
        assert any(re.search(match, message) for message in messages), f"{match!r} is not among {messages}"
