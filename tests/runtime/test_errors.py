import os
import subprocess

import pytest

from mixer.runtime.errors import (
    InputError,
    Interrupted,
    UsageError,
    listed,
    printable,
    shell_word,
)


def test_printable_text_moves_no_cursor_and_starts_no_line():
    assert printable("a\nb\x1b[2J \udcff é") == r"a\nb\x1b[2J \udcff é"


def test_listed_says_how_many_are_left_out():
    assert listed([]) == "" and listed("abc", 3) == "a, b, c"
    assert listed(range(2000), 2) == "0, 1 and 1,998 more"
    assert listed(["a\nb"]) == r"a\nb"


def test_a_usage_error_has_one_line_per_problem():
    assert str(UsageError(["one\nline", "other"])) == "one\\nline\nother"
    assert UsageError([]).exit_code == InputError.exit_code == 2


def test_no_handler_of_exceptions_swallows_a_signal():
    with pytest.raises(Interrupted, match="stopped by SIGHUP at step 3") as e:
        try:
            raise Interrupted(1, " at step 3")
        except Exception:
            pass
    assert e.value.exit_code == 129


@pytest.mark.parametrize("text", ["runs/a", "-dall", "a b", "it's", 'a"b$c`d`', "a\nb\x1b[2J", "",
                                  "é", "\udcff", "a\\nb\t1", "end/", "*", "~"])
def test_a_word_to_copy_is_printable_and_the_shell_reads_the_same(text):
    word = shell_word(text)
    assert word.isprintable()
    shell = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True)
    assert shell.stdout == os.fsencode(text)
