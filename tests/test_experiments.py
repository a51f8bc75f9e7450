from mixer.experiments import ROWS, published_curves


def test_the_nine_rows_and_their_published_curves():
    curves = published_curves()
    nine = [row.name for row in ROWS if row.published_mib and row.published_epoch_s]
    assert nine == list(curves) and len(nine) == 9
    for points in curves.values():
        assert [step for step, _, _ in points] == list(range(100, 5001, 100))
        assert all(0 < loss < 1 and 0.5 < acc <= 1 for _, loss, acc in points)
    # the figures the original's text quotes for its last step
    final = {name: round(100 * points[-1][2], 1) for name, points in curves.items()}
    assert (final["vit_linear-p24"], final["vit_cnn-p24"]) == (92.8, 91.9)
    assert (final["vit_linear-p16"], final["vit_cnn-p16"]) == (90.1, 90.7)
