"""Pages made from declarations are up to date, and the protocols' generated code is that of their .proto files."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _build() -> dict[str, object]:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[str, object] = module.PAGES
    return pages


@pytest.mark.parametrize("name", ["settings.md", "metrics.md"])
def test_page_is_current(name: str) -> None:
    page = _build()[name]
    assert callable(page)
    assert (ROOT / "docs" / name).read_text() == page(), "run `make docs`"


def test_every_setting_says_what_it_means() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    silent = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not silent, f"settings without a word: {silent}"


@pytest.mark.parametrize("proto", ["tidemill/proto/inference.proto", "tidemill/core/control.proto"])
def test_generated_code_is_current(proto: str, tmp_path: Path) -> None:
    from grpc_tools import protoc

    arguments = ["protoc", f"-I{ROOT}", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", str(ROOT / proto)]
    assert protoc.main(arguments) == 0
    for suffix in ("_pb2.py", "_pb2_grpc.py"):
        name = proto.replace(".proto", suffix)
        assert (ROOT / name).read_text() == (tmp_path / name).read_text(), "run `make protos`"
