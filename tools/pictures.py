"""The pictures of README.md, out of the executed notebooks: `python -m tools.pictures` writes docs/images/."""

import base64
import json

from tools.chapters import ROOT, SOLUTIONS

IMAGES = ROOT / "docs" / "images"
PICTURES = {  # file: chapter, and how the text that describes the figure begins
    "latent-attention.png": ("03", "Share recalled: "),
    "fp8.png": ("06", "Gap to BF16 over the steps"),
    "copies-of-copies.png": ("09", "Normal distributions of one chain"),
    "thinking.png": ("10", "Over 20 steps of GRPO"),
    "belief.png": ("14", "Share of answers with the wrong sum"),
}


def pictures() -> dict[str, tuple[bytes, str]]:
    """Each file's bytes and the text that describes it. Raises ValueError for a figure that is not found."""
    found = {}
    for name, (number, words) in PICTURES.items():
        (path,) = SOLUTIONS.glob(f"{number}_*.ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for output in (output for cell in cells for output in cell.get("outputs", [])):
            text = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if text.startswith(words):
                found[name] = base64.b64decode("".join(output["data"]["image/png"])), text
        if name not in found:
            raise ValueError(f"{path.name} has no figure with a text that begins with {words!r}")
    return found


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, (data, _) in pictures().items():
        (IMAGES / name).write_bytes(data)
    print(f"{IMAGES.relative_to(ROOT)} written")
