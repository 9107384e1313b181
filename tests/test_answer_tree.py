"""Labels as a tree: what they share is one node, and a label's score adds up the edges of its own path."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from multilora.answer_tree import AnswerTree, check_scorable, laid_out
from multilora.errors import AdapterError

END = 1
SHARED = ((5, 6, END), (5, 7, END), (5, END), (8, END))


def test_shared_beginnings_are_one_node():
    tree = AnswerTree.of(SHARED)
    assert tree.token_ids == (5, 6, 7, 8)
    assert tree.depths_N.tolist() == [0, 1, 2, 2, 1]
    assert [row.nonzero().flatten().tolist() for row in tree.reaches_NN] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4]]
    assert not tree.is_chain


def test_paths_hold_each_labels_own_tokens():
    tree = AnswerTree.of(SHARED)
    for answer, path_E in zip(SHARED, tree.paths_LE, strict=True):
        assert tree.edge_tokens_E[path_E > 0].tolist() == list(answer)
        assert set(path_E.tolist()) <= {0.0, 1.0}
    of_means = AnswerTree.of(SHARED, is_mean=True).paths_LE
    torch.testing.assert_close(of_means.sum(1), torch.ones(4))
    torch.testing.assert_close(of_means, tree.paths_LE / tree.paths_LE.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("answers", "is_chain"),
    [([(3, 4, END)], True), ([(END,)], True), ([(3, 4, END), (3, END)], True), ([(3, END), (4, END)], False)],
)
def test_a_chain_is_an_ordinary_text(answers, is_chain):
    assert AnswerTree.of(answers).is_chain == is_chain


def test_padding_reads_only_itself():
    trees = [AnswerTree.of(SHARED), AnswerTree.of([(9, END)])]
    reads_BNN, depths_BN = laid_out(trees, 8)
    assert torch.equal(reads_BNN[0, :5, :5], trees[0].reaches_NN)
    for row, tree in enumerate(trees):
        assert torch.equal(reads_BNN[row, tree.num_nodes :], torch.eye(8, dtype=torch.bool)[tree.num_nodes :])
        assert not reads_BNN[row, : tree.num_nodes, tree.num_nodes :].any()
    assert depths_BN[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_models_that_take_no_positions_are_refused(fresh_base, family):
    if family != "encoder":
        check_scorable(fresh_base(family).model)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(AdapterError, match="models of type bloom cannot be scored: they take no position_ids; use Llama"):
        check_scorable(bloom)
    other = fresh_base("seq2seq").model
    other.config.model_type = "pegasus"
    with pytest.raises(AdapterError, match="encoder-decoders of type pegasus cannot be scored; use t5, mt5, bart, mbart"):
        check_scorable(other)
