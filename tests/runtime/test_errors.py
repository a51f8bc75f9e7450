from mixer.runtime.errors import listed, printable


def test_printable_text_moves_no_cursor_and_starts_no_line():
    assert printable("a\nb\x1b[2J \udcff é") == r"a\nb\x1b[2J \udcff é"


def test_listed_says_how_many_are_left_out():
    assert listed([]) == "" and listed("abc", 3) == "a, b, c"
    assert listed(range(2000), 2) == "0, 1 and 1,998 more"
    assert listed(["a\nb"]) == r"a\nb"
