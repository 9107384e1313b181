"""A Ctrl-C is noted and not raised while it is held; the second one is raised."""

import signal
import threading

import pytest

from orchestrator.session import held_interrupt


@pytest.fixture(autouse=True)
def _interrupts_are_heard():
    """A shell starts what runs in the background with interrupts ignored, these tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_interrupt() as is_interrupted:
        signal.raise_signal(signal.SIGINT)
    assert not is_interrupted.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
