"""The one rule of patches: they cover the image."""


def check_patches(H: int, W: int, P: int) -> None:
    """Raise ValueError where patches of P x P pixels do not cover an image of H x W."""
    if H % P or W % P:
        sides = [side for side in range(2, min(H, W, 1024) + 1) if H % side == W % side == 0]
        raise ValueError(f"patch {P} does not divide a {H}x{W} image "
                         f"(these do: {', '.join(map(str, sides)) or 'only 1'})")
