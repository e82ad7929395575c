"Text metrics against golden numbers, other derivations and other libraries; records; predictions; baselines."
import math, os, re, warnings
from collections import Counter
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from diffnb.core import presets
from diffnb.data.text import Texts
from diffnb.data.tokens import Tokens
from diffnb.metrics.images import compare, recipe
from diffnb.metrics.language import (area, bits, bound_on, distinct, entropy, frontier, generative, judged, mauve,
                                     perplexity, perplexity_bound, reduced, total, unigram, word_counts_baseline)
from diffnb.metrics.text import (Predictions, WordNet, answer_f1, bleu, chrf, exact_match, f1, label_accuracy,
                                 load_predictions, majority, meteor, meteor_stem, plain_answer, predictions, rouge, rouge1,
                                 rouge2, rouge_l, rouge_lsum, token_accuracy, unparsed)
from diffnb.process.masked import Masked
from diffnb.rng import Rng

def one(text, *right, **kw): return Predictions([text], [list(right)], **kw)

# --- predictions and records ---
def test_secret_answers_are_left_out():
    t = Texts(['a', 'b', 'c'], ['x', '', 'y'], torch.tensor([0, -1, 1]), ['x', 'y'])
    p = predictions(t, ['x', 'y', 'x'])
    assert (p.texts, p.prompts, p.secret, len(p))==(['x', 'x'], ['a', 'c'], 1, 2) and label_accuracy(p).value==50
    with pytest.raises(ValueError, match='nothing to measure'): predictions(t.take(torch.tensor([1])), ['y'])
    with pytest.raises(ValueError, match='2 responses to 3'): predictions(t, ['x', 'y'])

def test_saved_predictions(tmp_path):
    p = Predictions(['a\nb', '"é\u2028'], [['x', 'y'], ['z']], ['p', 'q'], ['x', 'y'], 'mine', 3)
    p.save(tmp_path/'p.jsonl')
    q = load_predictions(tmp_path/'p.jsonl')
    for k in ('texts', 'right', 'prompts', 'classes', 'source', 'secret'): assert getattr(p, k)==getattr(q, k)
    assert f1(p)==f1(q) # the record is the same, hashes and all
    lines = (tmp_path/'p.jsonl').read_text().split('\n')
    for k,bad in ((1, '{"source": 1}'), (2, '{"prompt": "p"'), (3, '{"prompt": "p", "right": []}')):
        (tmp_path/'q.jsonl').write_text('\n'.join([*lines[:k-1], bad, *lines[k:]]))
        with pytest.raises(ValueError, match=f'q.jsonl, line {k}: no prediction'): load_predictions(tmp_path/'q.jsonl')

def test_predictions_fit():
    for a,b,say in ((['a'], [['x'], ['y']], '1 predictions, and 2 right'), (['a'], [[]], 'prediction 0 has no right answer'), ([], [], 'nothing to measure')):
        with pytest.raises(ValueError, match=say): Predictions(a, b)

def test_unlike_records_are_not_compared():
    a, b = one('a cat', 'the cat'), one('a dog', 'the cat')
    assert compare(f1(a), f1(b))==100.
    for x,y,say in ((f1(a), exact_match(a), 'metric'), (f1(a), f1(one('a cat', 'a dog')), 'reference'), (rouge1(a), rouge(a, 'rouge1', False), 'stem=True'),
                    (bleu(a), bleu(a, 'none'), 'smooth:exp'), (meteor_stem(a), bleu(a), 'extractor'), (f1(a), f1(Predictions(['a']*2, [['the cat']]*2)), 'n:')):
        with pytest.raises(ValueError, match=say): compare(x, y)
    assert f1(a).samples!=f1(b).samples and recipe(f1(a))==recipe(f1(b))

def test_presets_exist():
    names = {k for k,f in presets('text_metric').items() if f.__module__}
    assert {'label_accuracy', 'unparsed', 'majority', 'exact_match', 'f1', 'rouge1', 'rouge2', 'rouge_l', 'rouge_lsum', 'bleu', 'chrf', 'meteor', 'meteor_stem'}<=names
    assert all('lower_is_better' in presets('text_metric')[k].facts for k in names)

# --- labels ---
def test_labels():
    p = Predictions(['Positive.', 'negative', 'positive film', '', ' NEGATIVE '], [['positive']]*2+[['negative']]*3, classes=['negative', 'positive'])
    assert label_accuracy(p).value==40 and unparsed(p).value==40 and majority(p).value==60
    with pytest.raises(ValueError, match='no classes'): label_accuracy(one('a', 'a'))

def test_majority_of_sst2():
    p = Predictions(['x']*872, [['positive']]*444+[['negative']]*428, classes=['negative', 'positive'])
    assert f'{majority(p).value:.2f}'=='50.92'

def test_tokens_of_a_guesser():
    "Who knows nothing and guesses labels, right in a share p, has (2+p)/3 of the tokens where a response has three."
    g = torch.Generator().manual_seed(0)
    y, guess = torch.randint(0, 2, (2, 400), generator=g)
    def response(y): return torch.stack([y, torch.full_like(y, 8), torch.full_like(y, 9)], 1)
    p = (y==guess).double().mean().item()
    assert .4<p<.6 and token_accuracy(response(guess), response(y), torch.ones(400, 3, dtype=torch.bool))==pytest.approx(100*(2+p)/3)

def test_token_accuracy_is_not_label_accuracy():
    x0 = torch.tensor([[1, 9, 9, 9], [2, 9, 9, 9]])
    x, where = x0.clone(), torch.ones(2, 4, dtype=torch.bool)
    x[:,0] = 1
    assert token_accuracy(x, x0, where)==87.5
    where[:,1:] = False
    assert token_accuracy(x, x0, where)==50
    with pytest.raises(ValueError, match='no token'): token_accuracy(x, x0, ~where & where)

# --- answers ---
@pytest.mark.parametrize('text,want', [('The 1976 cat!', '1976 cat'), ('a-b', 'ab'), ('U.S.', 'us'), ('an  apple, a day', 'apple day'), ('the—end', '—end'),
                                       ('“The” end’s', '“ ” end’s'), ('theatre', 'theatre'), ('A', ''), ('', '')])
def test_normal_form(text, want): assert plain_answer(text)==want

def official_f1(pred, gold):
    "The rule as SQuAD 1.1 states it, by precision and recall."
    a, b = plain_answer(pred).split(), plain_answer(gold).split()
    same = sum(min(a.count(w), b.count(w)) for w in {*a})
    if same==0: return 0
    p, r = same/len(a), same/len(b)
    return 2*p*r/(p+r)

@settings(max_examples=100, deadline=None)
@given(a=st.lists(st.sampled_from('a the cat dog Dog ran. ran'.split()), max_size=7).map(' '.join), b=st.lists(st.sampled_from('the cat dog ran, on'.split()), max_size=7).map(' '.join))
def test_f1(a, b):
    assert abs(answer_f1(a, b)-official_f1(a, b))<1e-12 and answer_f1(a, b)==answer_f1(b, a)

def test_answers():
    assert answer_f1('Denver Broncos won', 'The Denver Broncos')==pytest.approx(.8)
    assert answer_f1('Broncos Broncos', 'Broncos')==pytest.approx(2/3)
    assert answer_f1('the', 'a')==0 and exact_match(one('the', 'a')).value==100
    p = Predictions(['1889', 'in Graz'], [['year 1889', '1889'], ['Graz', 'Vienna']])
    assert exact_match(p).value==50 and f1(p).value==pytest.approx(100*(1+2/3)/2)

# --- overlap ---
def test_rouge_golden():
    p = one('the cat is on the mat', 'the cat sat on the mat')
    assert [f(p).value for f in (rouge1, rouge2, rouge_l)]==pytest.approx([83.3333, 60, 83.3333], abs=1e-4)
    p = one('The cat sat on the mat.\nIt is sleeping.', 'The cat is on the mat.\nIt sleeps.')
    assert [f(p).value for f in (rouge1, rouge2, rouge_l, rouge_lsum)]==pytest.approx([94.1176, 53.3333, 82.3529, 94.1176], abs=1e-4)
    assert rouge(p, 'rouge1', stem=False).value<rouge1(p).value and 'rouge-score' in rouge1(p).extractor

def test_rouge_by_hand():
    "An own count of pairs, and the best of several references."
    def pairs(s): w = re.findall('[a-z0-9]+', s.lower()); return Counter(zip(w, w[1:]))
    def r2(t, o):
        a, b = pairs(t), pairs(o); n = sum((a&b).values())
        return 200*n/(a.total()+b.total()) if n else 0.
    texts = ['the quick brown fox', 'a dog ran over the hill', 'the hill the hill']
    refs = [['quick brown dogs', 'the brown fox'], ['a dog sat on the hill'], ['over the hill', 'hill the']]
    want = sum(max(r2(t, o) for o in r) for t,r in zip(texts, refs))/3
    assert rouge(Predictions(texts, refs), 'rouge2', stem=False).value==pytest.approx(want, abs=1e-9)

def test_sacrebleu_golden():
    p = one('the cat sat on the mat', 'the cat is on the mat')
    assert bleu(p).value==pytest.approx(37.991784, abs=1e-6) and chrf(p).value==pytest.approx(66.360671, abs=1e-6)
    p = Predictions(["Hello, world! It's 3.5%.", 'the cat sat'], [['Hello world! It is 3.5 %.'], ['the cat is here']])
    assert bleu(p).value==pytest.approx(23.802516, abs=1e-6) and bleu(p, 'none').value==0
    assert re.match(r'nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:', bleu(p).params)
    q = Predictions(['the cat sat on the mat', 'x'], [['a b', 'the cat sat on the mat'], ['x']]) # not equally many references
    assert bleu(q).value==pytest.approx(100) and 'nrefs:var' in bleu(q).params

# --- METEOR ---
NOUNS = [(['car', 'auto'], 'a machine'), (['goose'], 'a bird'), (['church', 'kirk'], 'a house'), (['city', 'hot_dog'], 'a place')]
VERBS = [(['make', 'create'], 'to bring about')]
ADJS = [(['large', 'big(p)'], 'of size')]

def wordnet_files(folder):
    "A WordNet in its own format: positions in bytes, counts in hexadecimal."
    for pos,letter,meanings in (('noun', 'n', NOUNS), ('verb', 'v', VERBS), ('adj', 'a', ADJS), ('adv', 'r', [])):
        data, index = '  1 a licence\n', {}
        for words,gloss in meanings:
            at = len(data.encode())
            for w in words: index.setdefault(re.sub(r'\(.*', '', w), []).append(at)
            data += f'{at:08d} 06 {letter} {len(words):02x} '+' '.join(f'{w} 0' for w in words)+f' 000 | é {gloss}\n'
        (folder/f'data.{pos}').write_text(data)
        (folder/f'index.{pos}').write_text('  1 a licence\n'+''.join(f'{w} {letter} {len(o)} 0 {len(o)} 0 '+' '.join(f'{i:08d}' for i in o)+'  \n' for w,o in index.items()))
    (folder/'noun.exc').write_text('geese goose\n')
    return folder

def test_wordnet_files(tmp_path):
    net = WordNet(wordnet_files(tmp_path))
    for word,want in {'car': [['car', 'auto']], 'Autos': [['car', 'auto']], 'geese': [['goose']], 'churches': [['church', 'kirk']], 'cities': [['city', 'hot_dog']],
                      'making': [['make', 'create']], 'creates': [['make', 'create']], 'bigger': [], 'larger': [['large', 'big']], 'xyz': [], '': []}.items():
        assert net.synonyms(word)==want, word
    (tmp_path/'data.verb').unlink()
    with pytest.raises(FileNotFoundError, match='data.verb.*meteor_stem'): WordNet(tmp_path)

def test_meteor_without_wordnet(tmp_path, monkeypatch):
    "Asked at call, with its default folder missing: one error that names the folder, and the metric that needs none."
    import inspect
    import diffnb.metrics.text as module
    default = inspect.signature(meteor).parameters['wordnet'].default
    if not Path(default).exists():
        with pytest.raises(FileNotFoundError, match=f'{default}.*meteor_stem'): meteor(one('a dog', 'a dog'))
    elsewhere = str(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='nowhere.*meteor_stem'): meteor(one('a dog', 'a dog'), elsewhere)
    real = WordNet
    monkeypatch.setattr(module, 'WordNet', lambda path: real(elsewhere) if str(path)==str(default) else real(path)) # as if the default were missing
    with pytest.raises(FileNotFoundError, match='nowhere.*meteor_stem'): meteor(one('a dog', 'a dog'))
    assert meteor_stem(one('a dog', 'a dog')).value>90

def test_meteor(tmp_path):
    folder = wordnet_files(tmp_path)
    assert meteor_stem(one('the cats sleep', 'the cat sleeps')).value==pytest.approx(98.1481, abs=1e-4)
    assert meteor_stem(one('two words', 'two words')).value==pytest.approx(93.75)
    a = one('a kirk car', 'a church auto')
    assert meteor(a, folder).value==pytest.approx(meteor_stem(one('a kirk car', 'a kirk car')).value, abs=1e-9) # three matches in one chunk
    assert meteor_stem(a).value<50 and meteor(a, folder).params.endswith(WordNet(folder).id)
    assert meteor_stem(one('a dog', 'x', 'a dog')).value==meteor_stem(one('a dog', 'a dog')).value
    with pytest.raises(ValueError, match="'meteor' and 'meteor_stem'"): compare(meteor(a, folder), meteor_stem(a))

@pytest.fixture(scope='module')
def real_wordnet():
    "WordNet 3.0 as Debian ships it, or wherever DIFFNB_WORDNET points."
    folder = Path(os.environ.get('DIFFNB_WORDNET', '/usr/share/wordnet'))
    if not (folder/'data.noun').is_file(): pytest.skip(f'no WordNet in {folder}: install wordnet-base and wordnet-sense-index, or set DIFFNB_WORDNET to a folder with its files')
    return WordNet(folder)

def all_of(meanings): return {w for o in meanings for w in o}

def test_real_wordnet(real_wordnet):
    net = real_wordnet
    assert all_of(net.synonyms('car'))=={'car', 'auto', 'automobile', 'machine', 'motorcar', 'railcar', 'railway_car', 'railroad_car', 'gondola', 'elevator_car', 'cable_car'}
    assert len(net.synonyms('car'))==5 and net.synonyms('geese')[0][0]=='goose' and 'run' in all_of(net.synonyms('ran')) and net.synonyms('qwxyz')==[]
    assert meteor(one('the auto stopped', 'the car stopped'), net.path).value==pytest.approx(98.1481, abs=1e-4)
    assert meteor_stem(one('the auto stopped', 'the car stopped')).value<70

@pytest.mark.slow # nltk reads WordNet in a quarter of a minute
def test_real_wordnet_is_that_of_nltk(real_wordnet, tmp_path, monkeypatch):
    import nltk, shutil
    if not (real_wordnet.path/'index.sense').is_file(): pytest.skip('nltk wants index.sense: install wordnet-sense-index')
    folder = tmp_path/'corpora'/'wordnet'
    shutil.copytree(real_wordnet.path, folder)
    if not (folder/'lexnames').exists(): (folder/'lexnames').write_text(''.join(f'{i:02d}\tx{i}\t1\n' for i in range(45))) # Debian leaves it out
    monkeypatch.setattr(nltk.data, 'path', [str(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of other languages
        from nltk.corpus import wordnet as theirs
        for w in 'car dogs geese ran better best churches cities quickly went men axes feet data mice wolves bought well hot_dog is was flies dying glasses'.split():
            assert all_of(real_wordnet.synonyms(w))=={l.name() for s in theirs.synsets(w) for l in s.lemmas()}, w
        from nltk.translate.meteor_score import meteor_score
        t, r = 'the physician bought a big automobile', 'the doctor purchased a large car'
        assert meteor(one(t, r), real_wordnet.path).value==pytest.approx(100*meteor_score([r.split()], t.split(), wordnet=theirs), abs=1e-9)

# --- perplexity ---
def test_uniform_perplexity():
    class Even(torch.nn.Module):
        def forward(self, x, t, **cond): return torch.zeros(*x.shape, 8)
    p = Masked('straight', mask_id=7, vocab=8)
    x = torch.randint(0, 7, (3, 12), generator=torch.Generator().manual_seed(0))
    keep, mask = torch.arange(12).expand(3, -1)<4, torch.arange(12).expand(3, -1)<torch.tensor([[12], [9], [6]])
    nats, count = bound_on(Even(), p, [dict(x=x, keep=keep, mask=mask, idx=torch.arange(3), cond={})], m=3)
    assert count.tolist()==[8, 5, 2] and perplexity_bound(nats, count, 'x').value==pytest.approx(7, abs=1e-4) # float32 logits
    assert bits(nats, count)==pytest.approx(math.log2(7), abs=1e-5)

@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5))
def test_perplexity_does_not_depend_on_batches(cuts):
    nats, count = 5*Rng(0, 'nats').uniform(40), Rng(0, 'count').integers(9, 40)+1
    parts = [[o.sum() for o in v.tensor_split(sorted({*cuts}))] for v in (nats, count)]
    assert abs(total(torch.stack(parts[0]), torch.stack(parts[1]))-total(nats, count))<1e-10

def test_perplexity_records():
    a, k = torch.tensor([10., 9.]), torch.tensor([1, 9])
    assert perplexity(a, k, 't').value==pytest.approx(math.exp(1.9))
    for x,y in ((perplexity(a, k, 't'), perplexity_bound(a, k, 't')), (perplexity(a, k, 't'), perplexity(a, k, 'u')), (perplexity(a, k, 't'), perplexity(a, k+1, 't'))):
        with pytest.raises(ValueError, match='cannot be compared'): compare(x, y)
    with pytest.raises(ValueError, match='not finite'): total(torch.tensor([math.inf]), torch.tensor([1]))
    with pytest.raises(ValueError, match='0 tokens'): total(a, k*0)

def test_unigram():
    def made(ids, given): return Tokens(torch.tensor(ids, dtype=torch.int32), torch.tensor(given), torch.tensor([2, len(ids)]), 0, 9)
    train = made([1, 1, 2, 3, 1], [False, False, True, False, False]) # counts 0, 3, 0, 1 and one more each: 1, 4, 1, 2 of 8
    nats, count = unigram(train, made([1, 2, 3, 0], [False, False, True, False]), 4)
    assert count.tolist()==[2, 1] and nats.tolist()==pytest.approx([-math.log(4/8)-math.log(1/8), -math.log(1/8)])

# --- generative ---
def table(v=11, seed=0): return torch.randn(v, v, generator=torch.Generator().manual_seed(seed))

def test_judged():
    "Against torch's cross-entropy, text by text; batches and pads do not matter; nothing counts after the first end."
    T, ids = table(), [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 0], [3, 0, 5, 5]]
    want = [torch.nn.functional.cross_entropy(T[torch.tensor(o[:-1])], torch.tensor(o[1:]), reduction='sum').item() for o in ids]
    for b in (1, 2, 8):
        nats, count = judged(lambda x: T[x], ids, batch=b)
        assert nats.tolist()==pytest.approx(want, rel=1e-6) and count.tolist()==[2, 5, 1, 3]
    nats, count = judged(lambda x: T[x], ids, end=0)
    assert count.tolist()==[2, 5, 1, 1] and nats[3].item()==pytest.approx(-T[3].log_softmax(0)[0].item(), rel=1e-5)
    assert judged(lambda x: T[x], [[0, 1, 2]], end=0)[1].tolist()==[2] # an end that begins the text is no end
    assert judged(lambda x: T[x], ids, context=3)[1].tolist()==[2, 2, 1, 2]
    with pytest.raises(ValueError, match='text 1 has 1 tokens'): judged(lambda x: T[x], [[1, 2], [1]])

def test_generative_perplexity_has_its_entropy():
    T = torch.zeros(11, 11)
    ppl, e = generative(lambda x: T[x], [[1, 2, 3, 4], [1, 1, 1, 1]], 'even')
    assert ppl.value==pytest.approx(11, rel=1e-5) and e.value==pytest.approx(math.log(4)/2) and (ppl.metric, e.metric)==('generative_perplexity', 'entropy')
    assert entropy([[1, 1, 2, 2]])==pytest.approx(math.log(2))
    with pytest.raises(ValueError, match='no tokens'): entropy([[1], []])

def test_distinct():
    assert distinct(['a a b'], 1).value==pytest.approx(2/3) and distinct(['a b a b'], 2).value==pytest.approx(2/3)
    assert distinct(['a b', 'b A'], 2).value==1 and distinct(['a b', 'a b', 'x'], 2).value==.5
    with pytest.raises(ValueError, match='no text has 3 words'): distinct(['a b'], 3)

# --- MAUVE ---
def test_frontier_in_closed_form():
    p, q = torch.tensor([.5, .5, 0, 0]).double(), torch.tensor([0, 0, .3, .7]).double()
    assert area(frontier(p, p))==pytest.approx(1, abs=1e-12)
    assert area(frontier(p, q, points=3000))==pytest.approx(5*math.factorial(5)*math.factorial(4)/math.factorial(10), rel=1e-4)
    assert area(frontier(p, q, c=1., points=3000))==pytest.approx(.5, abs=1e-4) # lambda against 1-lambda
    # half of P's mass is all of Q's: KL(P|R) and KL(Q|R) by hand at lambda = 1/2
    h = torch.tensor([1., 0, 0, 0]).double()
    mid = frontier(p, h, points=1)[1]
    kq, kp = -math.log(.75), .5*math.log(.5/.75)+.5*math.log(.5/.25)
    assert mid.tolist()==pytest.approx([math.exp(-5*kq), math.exp(-5*kp)])

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_frontier_is_monotone_and_symmetric(seed):
    p, q = (Rng(seed, o).uniform(6).pow(3) for o in 'pq')
    p, q = p/p.sum(), q/q.sum()
    c = frontier(p, q)
    assert (c[1:,0]>=c[:-1,0]-1e-12).all() and (c[1:,1]<=c[:-1,1]+1e-12).all()
    assert area(c)==pytest.approx(area(frontier(q, p)), abs=1e-12) and 0<=area(c)<=1+1e-12

def islands(counts, seed=0):
    "Points close to the axes, so many to each."
    x = torch.eye(len(counts))[torch.tensor([k for k,n in enumerate(counts) for _ in range(n)])]
    return x+.01*Rng(seed, 'islands').normal(*x.shape)

def test_mauve_finds_the_histograms():
    "Cells that anyone can see: MAUVE must be the area for the true histograms."
    a, b = islands([30, 20, 10, 0], 1), islands([0, 20, 30, 10], 2)
    want = area(frontier(torch.tensor([30, 20, 10, 0]).double()/60, torch.tensor([0, 20, 30, 10]).double()/60))
    got = mauve(a, b, 'axes', k=4)
    assert got.value==pytest.approx(want, abs=1e-9) and 'k=4' in got.params
    assert mauve(a, a, 'axes').value>.999 and mauve(a, b, 'axes', k=4)==got # the same again
    assert mauve(islands([60, 0, 0, 0]), islands([0, 0, 0, 60]), 'axes', k=2).value<.01

def test_mauve_refuses():
    a = islands([30, 30])
    for x,y,say in ((a, a[:,:1], 'one network for both'), (a[:1], a, 'two texts'), (a*math.nan, a, 'not finite')):
        with pytest.raises(ValueError, match=say): mauve(x, y, 'axes')
    with pytest.raises(ValueError, match='cannot be compared'): compare(mauve(a, a, 'axes', k=2), mauve(a, a, 'axes', k=3))

def test_reduced_keeps_the_share():
    x = Rng(0, 'x').normal(200, 6, dtype=torch.float64)*torch.tensor([5, 3, 1, .3, .1, .1]).double()
    z = torch.nn.functional.normalize(x, dim=1)
    z = z-z.mean(0)
    r = reduced(x, .9)
    share = [o.square().sum()/z.square().sum() for o in (r, r[:,:-1])]
    assert share[0]>=.9>share[1] and torch.allclose(reduced(x, 1.).square().sum(), z.square().sum())

# --- baseline ---
def test_counting_words():
    words = dict(good='fine great lovely'.split(), bad='dull poor sad'.split())
    def made(n, seed):
        k = Rng(seed, 'class').integers(2, n).tolist()
        w = Rng(seed, 'word').integers(3, n).tolist()
        names = ['bad', 'good']
        return Texts([f'film is {words[names[a]][b]} thing' for a,b in zip(k, w)], [names[a] for a in k], torch.tensor(k), names)
    assert label_accuracy(word_counts_baseline(made(60, 0), made(40, 1))).value==100
    noise = Texts(['xx yy zz']*40, ['bad', 'good']*20, torch.tensor([0, 1]*20), ['bad', 'good'])
    assert 40<=label_accuracy(word_counts_baseline(noise, noise)).value<=60
    with pytest.raises(ValueError, match='the same ones are needed'): word_counts_baseline(noise, Texts(['a'], ['b'], torch.tensor([0]), ['b']))
