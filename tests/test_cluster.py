"""A Ctrl-C is noted and not raised while it is held; the second one is raised."""

import signal
import threading

import pytest

from orchestrator.cluster import held_interrupt


def test_the_first_interrupt_is_noted_and_the_second_raised():
    with held_interrupt() as is_interrupted:
        assert not is_interrupted.is_set()
        signal.raise_signal(signal.SIGINT)
        assert is_interrupted.wait(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_an_interrupt_is_raised_as_before():
    with held_interrupt() as is_interrupted:
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not is_interrupted.is_set()


def test_another_thread_hears_of_none():
    seen = []

    def hold():
        with held_interrupt() as is_interrupted:
            seen.append(is_interrupted.is_set())

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
