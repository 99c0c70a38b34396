import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from ebm.evaluation import report


def test_page_needs_nothing_else_and_escapes(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    section = report.Section(
        "Sets <&>", ["set", "AUROC"], [["a", "0.5"], ["longer", "1"]], ["note"], {"a.png": "A dot"}
    )
    report.write(tmp_path / "report.html", "T", [section], {"ood/x": "not <there>"}, {"seed": 0})
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == (tmp_path / "a.png").read_bytes()
    assert "Sets &lt;&amp;&gt;" in page and "not &lt;there&gt;" in page and "A dot" in page and "seed" in page


def test_text_table_is_aligned() -> None:
    section = report.Section("t", ["set", "AUROC"], [["a", "0.5"], ["longer", "1.25"]], ["note"], {})
    assert section.text() == "set     AUROC\na         0.5\nlonger   1.25\nnote"


@pytest.mark.parametrize("text", ["[]", "nothing", '{"auroc/x": NaN}', "{}"])
def test_what_is_no_evaluation_is_not_compared(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.json").write_text(text)
    with pytest.raises(ValueError):
        report.compare([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
