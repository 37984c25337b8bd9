"""Log lines: their two forms, the request that they belong to, and what they never say."""

import asyncio
import gc
import json
import logging

import pytest

from service import logs

RECORD = logging.LogRecord("service.x", logging.WARNING, "f.py", 1, "%d of %s", (3, "it"), None)


def failed() -> logging.LogRecord:
    """A record of an exception whose message holds what nobody may log."""
    try:
        raise ValueError("a secret text")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    return logging.LogRecord("service.x", logging.ERROR, "f.py", 1, "it failed", (), info)


async def formatted(formatter: logging.Formatter, record: logging.LogRecord, request: str) -> str:
    logs.in_request(request)
    return formatter.format(record)


def test_a_line_for_people() -> None:
    line = logs.TextFormatter().format(RECORD)
    assert line.endswith(" WARNING service.x: 3 of it")


def test_a_line_for_programs() -> None:
    line = json.loads(logs.JsonFormatter().format(RECORD))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "WARNING", "logger": "service.x", "message": "3 of it"}


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_a_line_names_its_request_and_no_other(formatter: logging.Formatter) -> None:
    async def both() -> tuple[str, str]:
        return await asyncio.gather(
            asyncio.create_task(formatted(formatter, RECORD, "request-1")),
            asyncio.create_task(formatted(formatter, RECORD, "request-2")),
        )

    first, second = asyncio.run(both())
    assert "request-1" in first
    assert "request-2" in second
    assert "request" not in formatter.format(RECORD)


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_an_exception_is_told_by_its_kind_and_place_alone(formatter: logging.Formatter) -> None:
    line = formatter.format(failed())
    assert "ValueError" in line
    assert "test_logs.py" in line
    assert "secret" not in line


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_a_task_that_nobody_waits_for_tells_no_message_either(
    formatter: logging.Formatter, caplog: pytest.LogCaptureFixture
) -> None:
    async def forgotten() -> None:
        async def fails() -> None:
            raise ValueError("a secret text")

        task = asyncio.create_task(fails())
        await asyncio.wait([task])
        del task

    asyncio.run(forgotten())
    gc.collect()

    (record,) = [one for one in caplog.records if one.name == "asyncio"]
    assert "secret" in record.getMessage()
    line = formatter.format(record)
    assert "never retrieved" in line
    assert "ValueError" in line
    assert "secret" not in line


def test_what_is_said_stays_on_its_line() -> None:
    record = logging.LogRecord("service.x", logging.INFO, "f.py", 1, "said %s", ("a\r\nb",), None)
    assert logs.TextFormatter().format(record).endswith("said a\\r\\nb")


@pytest.mark.parametrize("name", ["gpt-4o", "org/model:7b", "ft@1=x+y"])
def test_a_name_is_shown(name: str) -> None:
    assert logs.named(name) == name


@pytest.mark.parametrize("text", ["", "two words", "a\n", "x" * 129, "\u0661", "\ud800"])
def test_what_is_no_name_is_not(text: str) -> None:
    assert logs.named(text) == logs.NO_NAME


def test_one_handler_writes_every_line() -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        logs.configure("json", "WARNING")
        (handler,) = root.handlers
        assert isinstance(handler.formatter, logs.JsonFormatter)
        assert root.level == logging.WARNING
    finally:
        root.handlers[:] = before
        root.setLevel(level)
