import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import write_store
from universality.activations.store import ActivationStore
from universality.errors import StudyError
from universality.features.codes import read_codes
from universality.features.encode import encode_store
from universality.features.settings import FeaturesSettings
from universality.saes.build import build_sae
from universality.saes.folder import save_sae
from universality.saes.load import load_sae
from universality.saes.settings import TopKSettings
from universality.storage import read_json

D, F, ROWS = 6, 20, 50


@pytest.fixture
def store(tmp_path):
    values = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0))
    return ActivationStore(write_store(tmp_path / "store", values, [20, 30], split="evaluation"))


@pytest.fixture
def dictionary(tmp_path):
    sae = build_sae(TopKSettings(k=3, k_aux=1, aux_coefficient=0.0), F, [D])
    torch.manual_seed(1)
    for parameter in sae.parameters():
        parameter.data.normal_()
    save_sae(sae, tmp_path / "sae", {})
    return tmp_path / "sae"


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_codes_are_those_of_the_sae_in_order(store, dictionary, tmp_path, batch_size):
    encode_store(store, dictionary, FeaturesSettings(threads=1, batch_size=batch_size), tmp_path / "codes")
    expected = load_sae(dictionary).encode(store.read(0, ROWS)).numpy()
    np.testing.assert_allclose(read_codes(tmp_path / "codes").by_token.toarray(), expected, rtol=1e-5, atol=1e-6)
    table = pq.read_table(tmp_path / "codes" / "codes.parquet")
    assert [str(column.type) for column in table.schema] == ["int32", "int32", "float"]
    places = table["token"].to_numpy() * F + table["feature"].to_numpy()
    assert (np.diff(places) > 0).all()
    assert len(places) == (expected > 0).sum()
    assert read_json(tmp_path / "codes" / "summary.json") == {"n_tokens": ROWS, "d_sae": F}


def test_an_sae_of_another_width_is_refused(dictionary, tmp_path):
    store = ActivationStore(write_store(tmp_path / "wide", torch.zeros(10, D + 1), [10]))
    with pytest.raises(StudyError, match=r"/sae: reads width 6, but resid_post\.0 has width 7"):
        encode_store(store, dictionary, FeaturesSettings(threads=1, batch_size=7), tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
