"""A confusion matrix -> accuracy with its interval, recall of each class, text."""
from ..runtime.errors import printable
from .intervals import wilson


def evaluation(confusion: list[list[int]], loss: float, classes: list[str]) -> dict:
    """The contents of evaluation.json, from counts [true][predicted] and the mean loss.

    A class without images has a recall of None.
    """
    images = sum(map(sum, confusion))
    correct = sum(row[i] for i, row in enumerate(confusion))
    return {"images": images, "loss": loss, "accuracy": correct / images,
            "accuracy_interval": wilson(correct, images),  # 95 %
            "recall": {name: row[i] / sum(row) if any(row) else None
                       for i, (name, row) in enumerate(zip(classes, confusion, strict=True))},
            "classes": classes, "confusion": confusion}


def evaluation_text(e: dict) -> str:
    """The same for people; classes from the lowest recall to the highest."""
    low, high = e["accuracy_interval"]
    lines = [f"accuracy {e['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
             f"loss {e['loss']:.4f}, over {e['images']:,} images"]
    # a line per class, and with what it is mixed up most often
    names = [printable(name) for name in e["classes"]]
    width = max(len("class"), *map(len, names))
    lines.append(f"{'class':<{width}}  images  recall  most often taken for")
    found = [i for i, row in enumerate(e["confusion"]) if any(row)]
    for i in sorted(found, key=lambda i: e["recall"][e["classes"][i]]):
        row = e["confusion"][i]
        count, rival = max((n, j) for j, n in enumerate(row) if j != i)
        taken = f"{names[rival]} ({count})" if count else "-"
        lines.append(f"{names[i]:<{width}}  {sum(row):>6,}  {row[i] / sum(row):>6.3f}  {taken}")
    return "\n".join(lines)
