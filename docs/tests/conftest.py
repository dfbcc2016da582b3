"""The tests of the pages: ``pytest docs/tests``, and of the site where it was built: ``--site FOLDER``."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--site", default=None, help="the folder of the built site, to be tested (nox -s docs)")


def pytest_configure() -> None:
    # What a shell starts in the background ignores SIGINT, and so would the scripts that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "test_site.py" and config.getoption("site") is None else None


def pytest_report_header(config: pytest.Config) -> str | None:
    built = config.getoption("site") is not None
    return None if built else "not collected: docs/tests/test_site.py (it tests the built site; nox -s docs builds it)"
