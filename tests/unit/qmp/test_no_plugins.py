import subprocess
import sys

PROGRAM = """
import sys
from migrationd.qmp.models.no_plugins import LOADER, forgo_plugins
forgo_plugins()
from migrationd.qmp.models.control import HumanMonitorCommand
HumanMonitorCommand.model_validate({"command-line": "info status"})
print(sys.modules[LOADER].__file__ if hasattr(sys.modules[LOADER], "__file__") else "ours")
print("importlib.metadata" in sys.modules)
"""


def test_the_first_model_imports_no_plugins_and_nothing_to_find_them() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{PROGRAM}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["ours", "False"], done.stdout


def test_plugins_that_were_loaded_stay() -> None:
    program = """
import sys, pydantic.plugin._loader as loader
from migrationd.qmp.models.no_plugins import LOADER, forgo_plugins
forgo_plugins()
assert sys.modules[LOADER] is loader
"""
    subprocess.run([sys.executable, "-c", program], check=True)
