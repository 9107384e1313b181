"""Lines of a logger that has a file of its own are there, and nowhere else."""

import logging

from multilora.log import log_apart


def test_lines_apart_are_in_their_file_alone(tmp_path, caplog):
    logger = logging.getLogger("tests.apart")
    logger.setLevel(logging.INFO)
    logger.info("before")
    log_apart(logger.name, tmp_path / "apart.log")
    logger.info("task=%s", "mood")
    for handler in logger.handlers:
        handler.close()
    (line,) = (tmp_path / "apart.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith(" task=mood")
    assert [record.getMessage() for record in caplog.records] == ["before"]
