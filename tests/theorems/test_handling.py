"""What surrounds the loss: the reference, rows and masks, tokenisation, fine-tuning, the model."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from mistakes import mistake
from worlds import (
    END,
    V,
    assert_same,
    bigram,
    gpt,
    log_probability,
    responses,
    rows,
    seeds,
    uniform,
)

token_lists = st.lists(st.integers(0, 5), min_size=1, max_size=5)


# ------------------------------------------------- the reference


@mistake("the reference is the policy itself", 28, "copy.deepcopy(policy) before the first step")
def test_reference_stays_where_the_policy_started(make_reference):
    """pi_theta moves  =>  pi_ref does not.  pitfall 28"""
    pi = bigram(0)
    reference = make_reference(pi)
    with torch.no_grad():
        pi.logits.add_(1.0)
    ids = torch.tensor([[0, 1, 2]])
    assert_same(reference(ids), bigram(0)(ids), 0.1)  # in any precision


@mistake("policy and reference have different dtypes", 14, "keep both in the same dtype")
def test_reference_has_the_policys_dtype(make_reference):
    """pi_ref is a copy of pi_theta  =>  the same dtype and bitwise the same logits.  pitfall 14"""
    ids = torch.tensor([[0, 1, 0]])
    for pi in gpt(0), gpt(0).float():
        reference = make_reference(pi)
        assert {p.dtype for p in reference.parameters()} == {pi.wte.weight.dtype}
        assert torch.equal(reference(ids), pi(ids))


@mistake("the reference can be trained", 28, "requires_grad_(False) on the reference")
def test_reference_is_frozen(make_reference):
    """pi_ref has no trainable parameter, and pi_theta keeps all of its own.  pitfall 28"""
    pi = bigram(0)
    reference = make_reference(pi)
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in pi.parameters())


@mistake("log pi_ref is not computed as in training", 18, "use the same function, mask and dtype")
@given(seed=seeds)
def test_reference_log_probabilities_are_those_of_the_model(reference_logps, seed):
    """log pi_ref(y|x) computed beforehand is the chain rule's.  pitfall 18"""
    pi = bigram(seed)
    expected = [log_probability(pi, [0], y) for y in responses([0])]
    found = reference_logps(pi, *rows([0], responses([0])))
    assert_same(found, torch.stack(expected))
    assert not found.requires_grad, "the reference carries a gradient"


@mistake("the random state changes", 18, "do not draw random numbers while scoring: use eval()")
def test_scoring_the_reference_draws_no_random_number(reference_logps):
    """The random state is the same before and after.  pitfall 18"""
    state = torch.get_rng_state()
    reference_logps(bigram(0), *rows([0], responses([0])))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------- rows and masks, in the order of diagnosis


@mistake("an end token is added to a cut response", 11, "keep the ids as sampled")
@given(x=token_lists, y=token_lists)
def test_no_end_token_is_added(collate, x, y):
    """A response without end token  =>  the mask holds no end token.  pitfalls 9, 11"""
    eos = 6
    ids, mask = collate([x], [y], eos, 20)
    assert eos not in ids[mask], f"the mask holds {ids[mask].tolist()}, the response is {y}"


@mistake("the mask is ids != pad, where pad = eos", 10, "build it from lengths")
@given(x=token_lists, y=token_lists)
def test_mask_covers_an_end_token_that_equals_the_padding(collate, x, y):
    """pad = eos  =>  the last token under the mask is the end token.  pitfall 10"""
    eos = 5
    y = [0, *[t for t in y if t != eos], eos]
    ids, mask = collate([x, x], [y, [0, *y]], eos, 20)
    found = ids[0][mask[0]].tolist()
    assert found[-1:] == [eos], f"the mask holds {found}, the response is {y}"


@mistake("the mask does not match the response", 2, "make it True exactly on the response's tokens")
@given(xs=st.lists(token_lists, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_mask_covers_exactly_the_responses(collate, xs, seed):
    """Rows of unequal lengths  =>  ids under the mask are the responses, and ids before it the
    prompts.  pitfalls 2, 3, 7"""
    ys = [[(seed + i + k) % 5 for k in range(1 + (seed + i) % 4)] for i in range(len(xs))]
    ids, mask = collate(xs, ys, 5, 20)
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        assert ids[i][mask[i]].tolist() == y
        start = int(mask[i].int().argmax())
        assert ids[i, start - len(x) : start].tolist() == x


@mistake("truncation cuts a response", 20, "cut the prompt from the left, or drop the pair")
@given(x=st.lists(st.integers(0, 5), min_size=6, max_size=9), y=token_lists)
def test_long_prompt_leaves_the_response_whole(collate, x, y):
    """Prompt and response exceed the maximum length  =>  the whole response is in the mask, or the
    pair is refused with an error.  pitfall 20"""
    try:
        ids, mask = collate([x], [y], 0, 8)
    except ValueError:
        return
    assert ids[mask].tolist() == y, "the response was cut"


# ------------------------------------------------- tokenisation


def encode(text: str) -> list[int]:
    """A byte-pair encoding with one merge: "ab" is one token."""
    return [*map(ord, text.replace("ab", "\uffff"))]


@mistake("a merge across prompt and response", 8, "encode them separately, concatenate the ids")
@given(x=st.text("abc", min_size=1, max_size=6), y=st.text("abc", min_size=1, max_size=6))
def test_prompt_and_response_are_encoded_separately(tokenize, x, y):
    """Any strings  =>  encode(x) and encode(y): no token spans both.  pitfall 8"""
    x_ids, y_ids = tokenize(encode, x, y)
    assert list(x_ids) == encode(x), "the prompt's ids depend on the response"
    assert list(y_ids) == encode(y), "the response's ids depend on the prompt"


@mistake("text is stripped before it is encoded", 9, "keep the text or, better, the sampled ids")
@given(x=st.text("ab ", min_size=1, max_size=6), y=st.text("ab ", min_size=1, max_size=6))
def test_whitespace_is_kept(tokenize, x, y):
    """Leading and trailing blanks  =>  they are encoded too.  pitfall 9"""
    x_ids, y_ids = tokenize(encode, x, y)
    assert [*x_ids, *y_ids] == encode(x) + encode(y)


# ------------------------------------------------- supervised fine-tuning


@mistake("padding is in the loss", 3, "mask the labels of padding")
def test_fine_tuning_ignores_padding(sft_loss):
    """More padding, or another padding token  =>  the same loss.  pitfall 3"""
    pi = bigram(0)
    loss = sft_loss(pi, *rows([0], [[1, END]], 3))
    for pad in (0, 1):
        assert_same(sft_loss(pi, *rows([0], [[1, END]], 8, pad)), loss)


@mistake("a mean per sequence, or a wrong mask", 21, "-(logps * mask).sum() / mask.sum()")
@given(seed=seeds)
def test_fine_tuning_loss_is_a_mean_over_tokens(sft_loss, seed):
    """Responses of unequal lengths  =>  the loss is the mean nats per response token.
    pitfalls 1, 21"""
    pi, x, ys = bigram(seed), [0, 1], [[1], [0, 1, END]]
    nats = -sum(log_probability(pi, x, y) for y in ys)
    assert_same(sft_loss(pi, *rows(x, ys, 6)), nats / 4)


# ------------------------------------------------- the model

IDS = torch.tensor([[0, 1, 0, 1, 1]])


def changed(pi, t: int) -> torch.Tensor:
    """How much another token at t moves the logits at each position, (5,)."""
    other = IDS.index_fill(1, torch.tensor([t]), END)
    return (pi(other) - pi(IDS)).abs().amax(-1)[0]


@mistake("the model sees later tokens: no causal mask", 4, "mask attention to later positions")
def test_later_tokens_are_invisible(make_model):
    """Token t changes  =>  logits before t do not change.  pitfall 4"""
    pi = make_model(V, 6).eval()
    for t in range(5):
        assert (changed(pi, t)[:t] < 1e-5).all(), f"token {t} reaches earlier positions"


@mistake("earlier response tokens are hidden", 4, "the attention mask must hide padding only")
def test_earlier_tokens_are_visible(make_model):
    """Token t changes  =>  all logits from t on move.  pitfall 4"""
    torch.manual_seed(0)
    pi = make_model(V, 6).eval()
    with torch.no_grad():
        for p in pi.parameters():
            p.add_(0.3 * uniform(p.shape, -1.0, 1.0, p.numel()).to(p.dtype))
    for t in range(5):
        assert (changed(pi, t)[t:] > 0).all(), f"token {t} does not reach all later positions"


@mistake("dropout is on", 12, "set dropout to 0, or call eval() on the policy as well")
def test_training_and_evaluation_mode_are_the_same_function(make_model):
    """train() and eval() give the same logits.  pitfall 12"""
    pi = make_model(V, 6)
    assert torch.equal(pi.train()(IDS), pi.eval()(IDS))


@mistake("half-precision weights swallow small steps", 16, "keep float32 weights; use autocast")
def test_weights_are_at_least_float32(make_model):
    """All parameters are float32 or float64, in which a step of 1e-6 moves a weight near 1.
    pitfall 16"""
    assert {p.dtype for p in make_model(V, 6).parameters()} <= {torch.float32, torch.float64}


@mistake("logits depend on batch-mates", 26, "no normalisation over the batch")
def test_rows_of_a_batch_are_independent(make_model):
    """A row alone, or beside others  =>  the same logits.  pitfall 26"""
    pi = make_model(V, 6).eval()
    assert_same(pi(torch.cat((IDS, 1 - IDS)))[:1], pi(IDS), 1e-5)
