"""cluster/ moves data and restarts work: it knows the interfaces of methods, and none of the methods."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_module_of_cluster_imports_a_method_that_a_config_names():
    configs = "\n".join(path.read_text() for path in (ROOT / "conf").rglob("*.yaml"))
    methods = set(re.findall(r"_target_: [\w.]+\.(\w+)", configs))
    assert "SampleAndMatch" in methods
    imports = {
        (path.name, alias.name)
        for path in (ROOT / "cluster").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert [(module, name) for module, name in sorted(imports) if name in methods] == []
