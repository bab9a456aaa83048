import re
import subprocess
import sys
from pathlib import Path

import maskstore

FOLDER = Path(maskstore.__file__).parents[1]


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    exec(example, {})


def test_every_file_is_in_the_table():
    text = (FOLDER / "README.md").read_text()
    names = {path.stem for path in (FOLDER / "maskstore").glob("*.py")} - {"__init__"}
    assert names <= set(re.findall(r"`(\w+)`", text))


def test_every_error_is_in_the_tree_and_the_specification():
    errors = [value for value in vars(maskstore).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(error, maskstore.MaskError) for error in errors)
    tree = maskstore.errors.__doc__
    assert all(re.search(rf"\b{error.__name__}\b", tree) for error in errors)
    specification = (FOLDER / "FORMAT.md").read_text()
    corrupt = [error.__name__ for error in errors if issubclass(error, maskstore.MaskCorrupt)]
    assert all(f"`{name}`" in specification for name in corrupt if name != "MaskCorrupt")


def test_imports_no_torch():
    code = "import sys, maskstore; print({'torch', 'safetensors', 'cryptography'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"
