"Lightning's loop and ours: the same weights, averages and moments, one folder for both, and what is refused."
import logging, os, signal, subprocess, sys
from functools import partial
import pytest, torch
from adapted import create, randomise
from diffnb.codec.vae import vae_tiny
from diffnb.core import presets
from diffnb.data.images import Images, batches, floats, hflip
from diffnb.peft.lora import lora
from diffnb.process.gaussian import Gaussian
from diffnb.process.masked import Masked
from diffnb.rng import Rng
from diffnb.store import newest
from diffnb.train.codec import CodecTask, patch_critic, several
from diffnb.train.ema import halflife, power, snapshots
from diffnb.train.lightning import Averages, Hooks, LightningData, LightningTask, RunFolder, based
from diffnb.train.loop import every, fit, rows, sample_grid
from diffnb.train.muon import muon
from diffnb.train.parallel import forked
from diffnb.train.task import DiffusionTask, adamw, cosine, held_out_loss
from diffnb.weights import learned

lightning = pytest.importorskip('lightning')
logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:lightning', 'ignore::FutureWarning:lightning')

B, K, AVG = 6, 3, dict(short=halflife(20), long=power(.2)) # images a step, parts
LR = cosine(1e-2, 24, 400)

def images(size):
    g = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (20, 3, size, size), generator=g, dtype=torch.uint8), torch.arange(20)%3, ('a', 'b', 'c'))

def pictures(task, size, *more): return task, partial(batches, images(size), B, Rng(0), transforms=(*more, hflip))

def plain(**kw):
    "Images with labels that are dropped; the weight of the loss learns too."
    net = randomise(create('dit_tiny', classes=3, size=8, ch=3))
    return pictures(DiffusionTask(net, Gaussian('straight', 'flow', learned(dim=16)), drop=.3, lr=LR, **kw), 8, floats)

def adapter():
    "An adapter over a base that stands still, with dropout."
    net = randomise(create('dit_tiny', classes=3, size=8, ch=3))
    torch.manual_seed(1)
    return pictures(DiffusionTask(lora(rank=2, dropout=.3)(net), Gaussian('straight', 'flow'), drop=.3, lr=LR, optimiser=muon()), 8, floats)

def latents():
    "In the space of a frozen codec."
    torch.manual_seed(2)
    return pictures(DiffusionTask(randomise(create('dit_tiny', classes=3, size=8)), Gaussian('straight', 'flow'), vae_tiny(), lr=LR), 32)

def autoencoder():
    "A codec and its critic, with an optimiser each."
    torch.manual_seed(3)
    both = several(dict(codec=muon(0.), critic=adamw(0., (.5, .9))), dict(critic=.3))
    return pictures(CodecTask(vae_tiny(learn=True), patch_critic(width=16, layers=1), optimiser=both, lr=LR), 16)

def text():
    "Texts of different lengths, a prompt that is kept, and dropout."
    net = randomise(create('bert_tiny'))
    def data(start):
        for k in range(start//B, 10**6):
            ids = torch.arange(k*B, (k+1)*B)
            x, long = (ids[:,None]*7+torch.arange(12)**2)%43+5, (ids*5%9+3)[:,None]
            yield dict(x=x, idx=ids, mask=torch.arange(12)<long, keep=torch.arange(12).expand(B, 12)<2)
    return DiffusionTask(net, Masked('poly', net.mask_id, 48), lr=LR), data

CASES = {f.__name__: f for f in (plain, adapter, latents, autoencoder, text)}

def ours(case, steps, folder=None, k=K, **kw):
    task, data = CASES[case]()
    return fit(task, data, steps, folder, averages=AVG, bar=False, accumulate=k, **kw)

def trainer(steps, callbacks=(), k=K, **kw):
    own = dict(accelerator='cpu', devices=1, max_steps=steps, accumulate_grad_batches=k, gradient_clip_val=1., callbacks=list(callbacks),
               enable_checkpointing=False, logger=False, enable_progress_bar=False, enable_model_summary=False)
    return lightning.Trainer(**{**own, **kw})

def theirs(case, steps, folder=None, k=K, callbacks=(), save_every=1000, **kw):
    task, data = CASES[case]()
    module = LightningTask(task)
    more = [RunFolder(folder, save_every=save_every)] if folder else []
    trainer(steps, [*more, *callbacks, Averages(AVG)], k, **kw).fit(module, LightningData(data))
    return module.run

def bits(run):
    out = {f'net/{k}': v for k,v in run.task.net.state_dict().items()}
    out |= {f'{n}/{k}': v for n,e in run.emas.items() for k,v in [*e.avg.items(), *e.buffers.items()]}
    name = {id(p): k for k,p in run.task.net.named_parameters()}
    out |= {f'opt/{name[id(p)]}/{k}': torch.as_tensor(v) for p,s in run.opt.state.items() for k,v in s.items()}
    p = run.progress
    return out | dict(progress=torch.tensor([p.step, p.images, p.skipped]), each=run.last.each, t=run.last.t, last=torch.tensor(run.last[1:4]))

def unlike(a, b):
    a, b = bits(a), bits(b)
    return [k for k in a.keys()|b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])]

@pytest.mark.parametrize('k', [1, K])
@pytest.mark.parametrize('case', CASES)
def test_bit_for_bit(case, k):
    a, b = ours(case, 4, k=k), theirs(case, 4, k=k)
    assert not unlike(a, b)
    assert unlike(a, ours(case, 3, k=k)) and a.progress.images==4*B

# --- one folder for both
BOTH = dict(fit=ours, lightning=theirs)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Ten steps without a stop."
    return {case: ours(case, 10, tmp_path_factory.mktemp('whole'), log_every=1) for case in ('plain', 'text')}

@pytest.mark.parametrize('first, second', [('lightning', 'lightning'), ('lightning', 'fit'), ('fit', 'lightning')])
@pytest.mark.parametrize('case', ['plain', 'text'])
def test_resume_bit_for_bit(whole, tmp_path, case, first, second):
    for name,n in ((first, 5), (second, 10)):
        run = BOTH[name](case, n, tmp_path, **{dict(fit='log_every', lightning='log_every_n_steps')[name]: 1})
        assert run.saved==newest(tmp_path)[0]==tmp_path/f'step-{n:08d}'
    assert not unlike(run, whole[case])
    a, b = rows(tmp_path), rows(whole[case].folder)
    for r in (*a, *b): del r['images_per_s']
    assert a==b and len(a)==10
    assert not [f for f in tmp_path.rglob('*') if f.is_file() and f.suffix not in ('.safetensors', '.json', '.jsonl', '.txt', '.lock', '')]

def taken(folder):
    "Does another process find the lock taken?"
    code = 'import fcntl, sys; fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX|fcntl.LOCK_NB)'
    return subprocess.run([sys.executable, '-c', code, folder/'lock'], capture_output=True).returncode>0

def test_nothing_is_left_to_do(tmp_path):
    a = theirs('plain', 3, tmp_path)
    b = theirs('plain', 3, tmp_path)
    assert b.progress.step==3 and b.last is None and not taken(tmp_path)
    for p,q in zip(a.task.net.parameters(), b.task.net.parameters()): assert torch.equal(p, q)

def test_on_in_memory():
    "A module that is trained twice goes on."
    task, data = plain()
    module = LightningTask(task)
    for n in (2, 4): trainer(n, [Averages(AVG)]).fit(module, LightningData(data))
    assert not unlike(module.run, ours('plain', 4))

def test_the_folder_of_another(tmp_path):
    theirs('plain', 1, tmp_path)
    task, data = plain()
    module, more = LightningTask(task, Rng(1)), [RunFolder(tmp_path), Averages(AVG)]
    with pytest.raises(ValueError, match='seed = 0, and now it is 1'): trainer(2, more).fit(module, LightningData(data))
    assert not taken(tmp_path)
    ours('plain', 2, tmp_path)
    with pytest.raises(ValueError, match='averages'): theirs('plain', 3, tmp_path, callbacks=[Averages(dict(ema=halflife()))])

def test_in_use(tmp_path):
    "Another process finds the lock taken during the run, and free after it."
    seen = []
    theirs('plain', 1, tmp_path, callbacks=[Hooks(step=lambda run: seen.append(taken(tmp_path)))])
    assert seen==[True] and not taken(tmp_path)
    def fail(run): raise RuntimeError('a hook of its own')
    with pytest.raises(RuntimeError, match='its own'): theirs('plain', 2, tmp_path, callbacks=[Hooks(step=fail)])
    assert not taken(tmp_path)

def test_stopped_by_a_signal(tmp_path):
    was = signal.getsignal(signal.SIGTERM)
    def stop(run):
        if run.progress.step==2: os.kill(os.getpid(), signal.SIGTERM)
    run = theirs('plain', 9, tmp_path, callbacks=[Hooks(step=stop)])
    assert run.stopped=='SIGTERM' and run.saved.name=='step-00000002' and 'SIGTERM' in (tmp_path/'log.txt').read_text()
    assert signal.getsignal(signal.SIGTERM)==was
    assert not unlike(theirs('plain', 4, tmp_path), ours('plain', 4))

# --- hooks
def test_hooks_see_whole_steps(tmp_path):
    told = {'fit': [], 'lightning': []}
    for name,f in BOTH.items():
        def note(e): return lambda run: told[name].append((e, run.progress.step, float(run.emas['short'].avg[next(iter(run.emas['short'].avg))].sum())))
        hooks = {e: note(e) for e in ('start', 'step', 'row', 'save', 'end')}
        more = dict(hooks=hooks, log_every=3) if name=='fit' else dict(callbacks=[Hooks(**hooks)], log_every_n_steps=3)
        f('plain', 4, tmp_path/name, save_every=2, **more)
        assert [r['step'] for r in rows(tmp_path/name)]==[3, 4]
    assert told['fit']==told['lightning']
    assert [o[:2] for o in told['fit'] if o[0]=='step']==[('step', n) for n in (1, 2, 3, 4)]

def test_pictures_and_snapshots(tmp_path):
    more = [Hooks(step=every(2, sample_grid((2, 3, 8, 8), 'short', steps=2))), Hooks(**snapshots(2)())]
    theirs('plain', 4, tmp_path/'a', callbacks=more)
    ours('plain', 4, tmp_path/'b', hooks=dict(step=[every(2, sample_grid((2, 3, 8, 8), 'short', steps=2)), snapshots(2)()['step']]))
    kinds = 'samples/*.png', 'ema/*/*.safetensors'
    a, b = ({f.relative_to(tmp_path/o).as_posix(): f.read_bytes() for k in kinds for f in (tmp_path/o).glob(k)} for o in 'ab')
    assert a==b and len(a)==4

def test_rows_need_a_folder():
    with pytest.raises(ValueError, match='RunFolder'): theirs('plain', 1, callbacks=[Hooks(row=print)])
    with pytest.raises(ValueError, match="'stpe'.*'step'"): Hooks(stpe=print)

# --- steps that fail
def broken(task, steps):
    "At some steps the loss is not finite."
    loss = task.loss
    def bad(batch, rng):
        o = loss(batch, rng)
        return o._replace(value=o.value*float('nan')) if rng.step in steps else o
    task.loss = bad
    return task

@pytest.mark.parametrize('k', [1, K])
def test_a_bad_step_is_skipped(k):
    runs = []
    for lit in (False, True):
        task, data = plain()
        broken(task, {1})
        module, skips = LightningTask(task), []
        more = dict(skip=lambda run: skips.append(run.progress.step))
        if lit: trainer(3, [Averages(AVG), Hooks(**more)], k).fit(module, LightningData(data)); runs.append(module.run)
        else: runs.append(fit(task, data, 3, averages=AVG, bar=False, accumulate=k, hooks=more))
        assert skips==[2]
    assert runs[0].progress.skipped==1 and not unlike(*runs)

def test_many_bad_steps():
    task, data = plain()
    module = LightningTask(broken(task, range(1, 99)), patience=3)
    with pytest.raises(FloatingPointError, match='3 steps in a row'): trainer(9).fit(module, LightningData(data))
    assert module.run.progress.step==4

# --- Lightning's options
def test_bfloat16():
    run = theirs('plain', 3, precision='bf16-mixed')
    assert not unlike(ours('plain', 3, amp=torch.bfloat16), run)
    assert unlike(ours('plain', 3), run) and run.options.amp is torch.bfloat16

def test_float16(tmp_path):
    "The scale of the loss is kept and goes on."
    def plugin(): return [lightning.pytorch.plugins.MixedPrecision('16-mixed', 'cpu')]
    theirs('plain', 2, tmp_path, plugins=plugin())
    run, want = theirs('plain', 4, tmp_path, plugins=plugin()), ours('plain', 4, amp=torch.float16)
    assert run.progress==want.progress and run.progress.scaler['_growth_tracker']
    assert not unlike(want, run)

def test_no_clipping():
    assert not unlike(ours('plain', 3, clip=None), theirs('plain', 3, gradient_clip_val=None))
    assert not unlike(ours('plain', 3, clip=.01), theirs('plain', 3, gradient_clip_val=.01))

@pytest.mark.parametrize('kw, says', [(dict(enable_checkpointing=True), 'pickles'), (dict(gradient_clip_algorithm='value'), 'norm'),
    (dict(precision='bf16-true'), 'bf16-mixed'), (dict(max_steps=-1, max_epochs=1, limit_train_batches=K), 'max_steps')])
def test_refused(tmp_path, kw, says):
    seen = []
    with pytest.raises(ValueError, match=says): theirs('plain', 1, default_root_dir=tmp_path, callbacks=[Hooks(step=seen.append)], **kw)
    assert not seen and not [*tmp_path.rglob('*.ckpt')] # before anything is computed

def test_no_pickles(tmp_path):
    task, data = plain()
    module, t = LightningTask(task), trainer(1)
    t.fit(module, LightningData(data))
    with pytest.raises(ValueError, match='pickles'): t.save_checkpoint(tmp_path/'x.ckpt')
    torch.save({'pytorch-lightning_version': '2.6.6', 'state_dict': {}}, tmp_path/'x.ckpt')
    with pytest.raises(ValueError, match='pickles'): trainer(2).fit(module, LightningData(data), ckpt_path=tmp_path/'x.ckpt')

def test_half_a_batch():
    with pytest.raises(RuntimeError, match='2 parts of a batch that was cut into 3'): theirs('plain', 2, limit_train_batches=2)

def test_other_data():
    task, data = plain()
    with pytest.raises(ValueError, match='LightningData'): trainer(1).fit(LightningTask(task), torch.utils.data.DataLoader(list(range(9))))

def test_epochs():
    "Lightning's epochs may end: the data goes on."
    assert not unlike(ours('plain', 5), theirs('plain', 5, limit_train_batches=2*K, max_epochs=-1))

def test_held_out():
    task, data = plain()
    module, logged, other = LightningTask(task), [], partial(data.func, images(8), 4, Rng(7), transforms=(floats,))
    class Note(lightning.Callback):
        def on_validation_end(self, trainer, module): logged.append(float(trainer.callback_metrics['held_out_loss']))
    t = trainer(4, [Averages(AVG), Note()], num_sanity_val_steps=0, val_check_interval=2*K, check_val_every_n_epoch=None)
    t.fit(module, LightningData(data, other, 3))
    assert len(logged)==2 and logged[0]!=logged[1] and not unlike(module.run, ours('plain', 4))
    want = [held_out_loss(task, iter([b]), 1, Rng().at('valid', step=i)) for b,i in zip(other(start=0), range(3))]
    assert logged[1]==pytest.approx(sum(want)/3, rel=1e-6) # float32
    assert t.validate(module, LightningData(data, other, 3), verbose=False)[0]['held_out_loss']==logged[1]

def test_what_lightning_logs(tmp_path):
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    theirs('plain', 4, logger=logger, log_every_n_steps=2)
    lines = (tmp_path/'lightning_logs'/'version_0'/'metrics.csv').read_text().splitlines()
    a, b = ours('plain', 2), ours('plain', 4)
    got = [dict(zip(lines[0].split(','), map(float, o.split(',')))) for o in lines[1:]]
    for r,o,n in zip(got, (a, b), (1, 3)):
        assert r['step']==n and [r[k] for k in ('loss', 'norm', 'lr')]==pytest.approx([o.last.loss, o.last.norm, o.last.lr], rel=1e-6) # float32

def test_frozen_parts_follow():
    for case in CASES:
        task, _ = CASES[case]()
        nets = [o for o in (*vars(task).values(), *vars(getattr(task, 'process', task)).values()) if isinstance(o, torch.nn.Module)]
        LightningTask(task).to('meta')
        assert nets and all(p.is_meta for o in nets for p in o.parameters())
    weight = learned(dim=16).requires_grad_(False)
    LightningTask(DiffusionTask(create('dit_tiny'), Gaussian('straight', 'flow', weight))).to('meta')
    assert all(p.is_meta for p in weight.parameters())

# --- several processes
def pair(folder):
    "What each of two processes gets; they keep their run."
    how = dict(k=1, devices=2, strategy='ddp_find_unused_parameters_true')
    return {case: bits(theirs(case, 3, folder/case, **how)) for case in ('plain', 'text')}

def test_two_processes(tmp_path):
    "Two are one up to the order of sums, and one goes on where two have stopped."
    got = forked(2, partial(pair, tmp_path))
    for case in ('plain', 'text'):
        pairs = [(o[case], bits(ours(case, 3, k=2))) for o in got]+[(bits(ours(case, 5, tmp_path/case, k=2)), bits(ours(case, 5, k=2)))]
        for a,b in pairs:
            assert a.keys()==b.keys()
            for k,v in b.items(): torch.testing.assert_close(a[k].to(v), v, rtol=1e-4, atol=1e-5)

# --- the extra
def test_without_the_extra(monkeypatch):
    based.cache_clear()
    monkeypatch.setitem(sys.modules, 'lightning', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffnb\[lightning\]'"): RunFolder('x')
    with pytest.raises(ModuleNotFoundError, match=r"diffnb\[lightning\]"): LightningTask(plain()[0])
    assert presets('average')
