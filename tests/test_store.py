"Folders that survive: kills at every file operation, full disks, damage, strangers' manifests; JSON and tensors."
import errno, json, math, os, random, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save as library_save, save_file
from diffnb import store
from diffnb.store import (Damaged, check_folder, ensure_room, held, leftovers, load_json, load_tensors, locate, newest,
                          point, prune, read_manifest, save_json, save_tensors, sweep, ties, write_file, write_folder)

POINTS = ['begun', 'filled', 'synced', 'sealed', 'old aside', 'new in place', 'durable', 'old removed']
NAMES = 'a.json', 'sub/b.txt'

def fill(folder, word):
    save_json(folder/'a.json', word)
    (folder/'sub').mkdir(); (folder/'sub'/'b.txt').write_text(word*100)

def write(path, word, **kw):
    with write_folder(path, **kw) as d: fill(d, word)

def word(folder):
    "What `fill` wrote, after every byte has been verified."
    check_folder(folder)
    w = load_json(folder/'a.json')
    assert (folder/'sub'/'b.txt').read_text() == w*100
    return w

def hidden(root): return [p.name for p in Path(root).glob('.*')]

def child(action):
    "Run in a fork, and give the signal that ended it, or 0."
    pid = os.fork()
    if not pid:
        try: action(); os._exit(0)
        except BaseException: import traceback; traceback.print_exc()
        os._exit(3)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

def die(): os.kill(os.getpid(), signal.SIGKILL)

# --- kills ---
@pytest.mark.parametrize('name', POINTS)
@pytest.mark.parametrize('replace', [False, True])
def test_kill_at_each_write_point(tmp_path, name, replace):
    root = tmp_path/'run'
    write(root/'step-1', 'one')
    if replace: write(root/'step-2', 'old')
    got = child(lambda: write(root/'step-2', 'new', on_point=lambda n: n == name and die()))
    if name == 'old aside' and not replace: return  # there was nothing to put aside
    assert got == signal.SIGKILL
    i, before = POINTS.index(name), 'old' if replace else 'one'
    found, passed = newest(root)
    assert word(found) == (before if i < 4 else 'new')
    assert [p for p, why in passed if 'stopped' in why] == ([] if i >= 4 else list(root.glob('.tmp-*')))
    if name == 'old aside': assert any('replacement was interrupted' in why for _, why in passed)
    assert word(locate(root/'step-1')) == 'one'
    done = sweep(root)
    assert not hidden(root) and (done or i > 6 or (not replace and i > 3))
    assert newest(root) == (root/('step-2' if replace or i > 3 else 'step-1'), []) and word(newest(root)[0]) == word_of(i, before)
    write(root/'step-2', 'again')
    assert word(newest(root)[0]) == 'again' and not hidden(root)

def word_of(i, before): return before if i < 4 else 'new'

OPERATIONS = {'open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.listdir', 'os.scandir', 'shutil.rmtree'}

def kill_at(k):
    "From now on, this process dies at its k-th file operation."
    left = [k]
    def hook(event, args):
        if event in OPERATIONS:
            left[0] -= 1
            if left[0] < 0: die()
    sys.addaudithook(hook)

def cycle(root):
    write(root/'step-10', 'ten')
    point(root, 'step-10')
    write(root/'step-9', 'nine again')
    prune(root, keep=1)

def kill_at_file_operations(tmp_path, every):
    "Write, point, replace, prune: wherever it stops, the last complete one is found, and all can be put in order."
    start = tmp_path/'start'
    for s, w in ((8, 'eight'), (9, 'nine')): write(start/f'step-{s}', w); point(start, f'step-{s}')
    k, seen = 0, set()
    while True:
        root = tmp_path/'run'; shutil.rmtree(root, ignore_errors=True); shutil.copytree(start, root)
        def action(): kill_at(k); cycle(root)
        if not child(action): break
        found, passed = newest(root)
        w = word(found)
        seen.add((found.name.split('-', 2)[-1] if found.name[0] == '.' else found.name, w))
        assert w in ('nine', 'ten')                         # never an older one
        named = root/(root/'latest').read_text().strip()
        assert word(locate(named)) in ('nine', 'nine again', 'ten')
        assert all(why for _, why in passed)
        assert all(map(store.sound, root.glob('step-*')))   # nothing is seen half removed
        sweep(root)
        assert not hidden(root) and word(newest(root)[0]) == w and sweep(root) == []
        if k % (7*every) == 0:
            cycle(root)
            assert [p.name for p in root.glob('step-*')] == ['step-10'] and not hidden(root)
        k += every
    assert k > 100 and {w for _, w in seen} == {'nine', 'ten'}

def test_kill_at_file_operations(tmp_path): kill_at_file_operations(tmp_path, 9)

@pytest.mark.slow
def test_kill_at_every_file_operation(tmp_path): kill_at_file_operations(tmp_path, 1)

def saving_for_ever(root, ready):
    def action():
        for s in range(1, 10**6):
            write(root/f'step-{s}', f'word {s}'); point(root, f'step-{s}'); prune(root, keep=2)
            if s == 3: os.write(ready, b'x')
    return action

def kill_at_any_time(tmp_path, times):
    rnd = random.Random(0)
    for i in range(times):
        root, (r, w) = tmp_path/f'{i}', os.pipe()
        pid = os.fork()
        if not pid:
            try: saving_for_ever(root, w)()
            finally: os._exit(3)
        os.read(r, 1); time.sleep(rnd.random()*.05)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); os.close(r); os.close(w)
        found, _ = newest(root)
        step = int(found.name.split('-')[-1])
        assert step >= 3 and word(found) == f'word {step}'
        assert step - int((root/'latest').read_text().split('-')[1]) in (0, 1)
        sweep(root)
        assert not hidden(root) and len(list(root.glob('step-*'))) in (2, 3)
        shutil.rmtree(root)

def test_kill_at_any_time(tmp_path): kill_at_any_time(tmp_path, 5)

@pytest.mark.slow
def test_kill_at_any_time_long(tmp_path): kill_at_any_time(tmp_path, 300)

@pytest.mark.parametrize('name', ['filled', 'sealed', 'old aside'])
def test_living_writers_are_left_alone(tmp_path, name):
    "A writer that is slow at one of its points is not taken for dead; once it is, what it left is swept."
    write(tmp_path/'step-1', 'old')
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        def wait(n):
            if n == name: os.write(w, b'x'); time.sleep(60)
        write(tmp_path/'step-1', 'new', on_point=wait)
        os._exit(3)
    os.read(r, 1)
    try:
        before = sorted(hidden(tmp_path))
        assert sweep(tmp_path) == [] and sorted(hidden(tmp_path)) == before and before
        found, passed = newest(tmp_path)
        assert word(found) == ('new' if name == 'old aside' else 'old') and passed
    finally: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    assert sweep(tmp_path) and hidden(tmp_path) == [] and word(tmp_path/'step-1') == word_of(4*(name == 'old aside'), 'old')

def test_what_is_not_ours_is_left_alone(tmp_path):
    for n in ('.git', '.tmp-notes', '.tmp-1234567-x', 'tmp-12345678-x'): (tmp_path/n).mkdir()
    assert sweep(tmp_path) == [] and leftovers(tmp_path) == [] and len(list(tmp_path.iterdir())) == 4
    assert sweep(tmp_path/'absent') == [] and newest(tmp_path/'absent') == (None, [])

def test_a_lock_is_exclusive_and_ends(tmp_path):
    with held(tmp_path) as a, held(tmp_path) as b: assert a and not b
    with held(tmp_path) as a: assert a

# --- errors on the way ---
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('name', POINTS[:6])
def test_an_error_puts_everything_back(tmp_path, error, name):
    write(tmp_path/'x', 'old')
    def stop(n):
        if n == name: raise error('stop')
    with pytest.raises(error): write(tmp_path/'x', 'new', on_point=stop)
    assert word(tmp_path/'x') == ('new' if name == 'new in place' else 'old')
    sweep(tmp_path)
    assert hidden(tmp_path) == []

def test_an_error_in_the_body(tmp_path):
    for old in (None, 'old'):
        if old: write(tmp_path/'x', old)
        with pytest.raises(ZeroDivisionError), write_folder(tmp_path/'x') as d: fill(d, 'new'); 1/0
        assert hidden(tmp_path) == [] and (tmp_path/'x').exists() == bool(old)
    assert word(tmp_path/'x') == 'old'

def test_order_on_the_disk(tmp_path, monkeypatch):
    "What a power cut must not find: a manifest before its files, a name before its folder, an old one gone too early."
    log, root = [], tmp_path/'run'
    write(root/'x', 'old')
    real = {n: getattr(os, n) for n in ('fsync', 'rename', 'replace')}
    def fsync(fd): real['fsync'](fd); log.append(('fsync', os.path.basename(os.readlink(f'/proc/self/fd/{fd}')).split('-')[-1]))
    def move(n): return lambda a, b: (real[n](a, b), log.append((n, Path(b).name.split('-')[-1])))
    monkeypatch.setattr(os, 'fsync', fsync)
    for n in ('rename', 'replace'): monkeypatch.setattr(os, n, move(n))
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, 'rmtree', lambda p, **k: (log.append(('rmtree', Path(p).name[:4])), rmtree(p, **k)))
    with write_folder(root/'x') as d: fill(d, 'new'); log.clear()
    m = log.index(('replace', 'manifest.json'))
    for f in ('a.json', 'b.txt', 'sub', 'x'): assert ('fsync', f) in log[:m], f
    assert ('fsync', 'manifest.json') == log[m-1] and ('fsync', 'x') == log[m+1]
    assert log[m+2:] == [('rename', 'x'), ('rename', 'x'), ('fsync', 'run'), ('rmtree', '.old')]

def test_refusals(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(ValueError, match='not a folder'), write_folder(tmp_path/'file'): pass
    for link in ('file', 'nowhere'):
        with pytest.raises(ValueError, match='only files and folders'), write_folder(tmp_path/'x') as d:
            (d/'l').symlink_to(tmp_path/link)
    with pytest.raises(ValueError, match='only files and folders'), write_folder(tmp_path/'x') as d: os.mkfifo(d/'pipe')
    with pytest.raises(Damaged, match='itself'), write_folder(tmp_path/'x') as d: (d/'manifest.json').write_text('{}')
    assert [p.name for p in tmp_path.iterdir()] == ['file']

# --- full disks ---
def test_injected_full_disk(tmp_path, monkeypatch):
    "No room at the k-th fsync, for every k up to the one after the rename."
    write(tmp_path/'x', 'old')
    real, k = os.fsync, 0
    while True:
        left = [k]
        def fsync(fd):
            left[0] -= 1
            if left[0] == -1: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd)
        monkeypatch.setattr(os, 'fsync', fsync)
        try: write(tmp_path/'x', 'new')
        except OSError as e:
            assert e.errno == errno.ENOSPC and str(tmp_path/'x') in str(e) and 'No space left' in str(e)
        else: break
        monkeypatch.setattr(os, 'fsync', real)
        w = word(tmp_path/'x')
        assert w == 'old' or not [p for p in hidden(tmp_path) if 'tmp' in p]
        if w == 'new': break
        assert hidden(tmp_path) == []
        k += 1
    assert k >= 6

def test_preflight(tmp_path, monkeypatch):
    write(tmp_path/'x', 'old')
    free = shutil.disk_usage(tmp_path).free
    for bad in (lambda: write(tmp_path/'x', 'new', room=free), lambda: ensure_room(tmp_path, free)):
        with pytest.raises(OSError, match='MiB are needed') as e: bad()
        assert e.value.errno == errno.ENOSPC
    assert word(tmp_path/'x') == 'old' and hidden(tmp_path) == []
    ensure_room(tmp_path, free//2)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(100, 0, 1000))
    with pytest.raises(OSError, match='MiB'): save_tensors(tmp_path/'t', {'a': torch.zeros(250)})
    save_tensors(tmp_path/'t', {'a': torch.zeros(200)})
    assert os.listdir(tmp_path/'..') and sorted(p.name for p in tmp_path.iterdir()) == ['t', 'x']

def test_size_limit_of_the_system(tmp_path):
    "A write that the kernel cuts short in the middle, for real: a limit on the size of files."
    write(tmp_path/'x', 'old')
    big, ok = {'a': torch.zeros(100_000)}, []
    def action():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for make in (lambda d: save_tensors(d/'t', big), lambda d: save_json(d/'j', 'x'*100_000)):
            try:
                with write_folder(tmp_path/'x') as d: make(d)
            except OSError as e: assert e.errno == errno.EFBIG and 'as it was before' in str(e)
            else: raise AssertionError
            try: make(tmp_path)
            except OSError: pass
            else: raise AssertionError
    assert child(action) == 0
    assert word(tmp_path/'x') == 'old' and [p.name for p in tmp_path.iterdir()] == ['x']

@pytest.fixture
def small_disk(tmp_path):
    d = tmp_path/'disk'; d.mkdir()
    mount = shutil.which('mount')
    if os.geteuid() or not mount or subprocess.run([mount, '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', d], capture_output=True).returncode:
        pytest.skip('a small disk needs root and mount')
    yield d
    subprocess.run(['umount', d], check=True)

def test_full_disk(small_disk):
    "A real one of 1 MiB, without the preflight, which would have refused."
    root = small_disk
    with write_folder(root/'step-1') as d: save_tensors(d/'t', {'a': torch.ones(100_000)})
    for name in ('step-1', 'step-2'):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(store, 'ensure_room', lambda *a: None)
            with pytest.raises(OSError, match='as it was before.*No space') as e, write_folder(root/name) as d:
                save_tensors(d/'t', {'a': torch.zeros(100_000), 'b': torch.zeros(100_000)})
            assert e.value.errno == errno.ENOSPC
        assert newest(root) == (root/'step-1', []) and hidden(root) == []
        assert load_tensors(root/'step-1'/'t')[0]['a'].sum() == 100_000
    with pytest.raises(OSError, match='MiB are needed'), write_folder(root/'step-2', room=2**20): pass
    (root/'ballast').write_bytes(bytes(shutil.disk_usage(root).free))
    with pytest.raises(OSError, match='as it was before'): write(root/'step-2', 'x'*50)
    with pytest.raises(OSError): save_json(root/'j.json', 'x'*50_000)
    assert newest(root) == (root/'step-1', []) and sorted(p.name for p in root.iterdir()) == ['ballast', 'step-1']

# --- damage ---
@pytest.mark.parametrize('name', [*NAMES, 'manifest.json'])
def test_truncated_at_every_length(tmp_path, name):
    write(tmp_path/'step-1', 'ok'); write(tmp_path/'step-2', 'new')
    f = tmp_path/'step-2'/name
    good = f.read_bytes()
    for n in {*range(0, len(good) - 1, 7), len(good) - 2}:  # a manifest does not miss its last line feed
        f.write_bytes(good[:n])
        with pytest.raises(Damaged, match=f'step-2.*{name}'): check_folder(tmp_path/'step-2')
        found, passed = newest(tmp_path)
        assert found == tmp_path/'step-1' and passed[0][0] == tmp_path/'step-2' and name in passed[0][1]
    f.write_bytes(good + b'x')
    with pytest.raises(Damaged): check_folder(tmp_path/'step-2')
    f.unlink()
    with pytest.raises(Damaged): check_folder(tmp_path/'step-2')
    f.write_bytes(good); check_folder(tmp_path/'step-2')

def test_altered_bits(tmp_path):
    write(tmp_path/'x', 'w')
    for name in (*NAMES, 'manifest.json'):
        f = tmp_path/'x'/name
        good = bytearray(f.read_bytes())
        for i in range(0, 8*len(good), 1 if len(good) < 20 else 7):
            good[i//8] ^= 1 << i%8; f.write_bytes(good); good[i//8] ^= 1 << i%8
            with pytest.raises(Damaged): check_folder(tmp_path/'x')
        f.write_bytes(good)
    assert word(tmp_path/'x') == 'w'

def entry(name='a.json', n=1, sha='0'*64): return dict(name=name, bytes=n, sha256=sha)
EVIL = ['../a', 'a/../../b', '/etc/passwd', '..', '.', '', 'a//b', './a', 'a/', 'a\\b', 'C:\\x', 'a\0b', 'x'*300, 'sub/../a.json']

@pytest.mark.parametrize('name', EVIL, ids=repr)
def test_names_that_lead_out_are_refused(tmp_path, name):
    write(tmp_path/'x', 'w'); (tmp_path/'a').write_text('w'); (tmp_path/'b').write_text('w')
    (tmp_path/'x'/'manifest.json').write_text(json.dumps(dict(format=1, files=[entry(name)])))
    with pytest.raises(Damaged, match='not a plain path|too long'): check_folder(tmp_path/'x')

def test_links_are_refused(tmp_path):
    (tmp_path/'secret').mkdir(); (tmp_path/'secret'/'b.txt').write_text('w'*100)
    for link in ('sub/b.txt', 'sub', 'manifest.json'):
        write(tmp_path/'x', 'w')
        p = tmp_path/'x'/link
        moved = tmp_path/'moved'; p.rename(moved); p.symlink_to(moved)  # even to the very same content
        with pytest.raises(Damaged, match='is a link'): check_folder(tmp_path/'x')
        shutil.rmtree(tmp_path/'x')
        shutil.rmtree(moved) if moved.is_dir() else moved.unlink()

FORMS = [[], 1, 'x', None, {}, {'format': 1}, {'files': []}, {'format': 2, 'files': []}, {'format': 1, 'files': {}, 'more': 1},
         {'format': 1, 'files': 3}, {'format': 1, 'files': [3]}, {'format': 1, 'files': [{}]}, {'format': 1, 'files': [entry(n=True)]},
         {'format': 1, 'files': [entry(n=1.)]}, {'format': 1, 'files': [entry(name=3)]}, {'format': 1, 'files': [entry(), entry()]},
         {'format': 1, 'files': [{**entry(), 'more': 1}]}, {'format': 1, 'files': [entry('manifest.json')]}]

@pytest.mark.parametrize('form', FORMS, ids=str)
def test_other_forms_are_no_manifest(tmp_path, form):
    (tmp_path/'a.json').write_text('x'); (tmp_path/'manifest.json').write_text(json.dumps(form))
    with pytest.raises(Damaged, match='manifest'): check_folder(tmp_path)

@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode),
                 st.just(b'['*100_000), st.just(b'{"format":1,"files":[' + b'9'*5000 + b']}')))
@settings(max_examples=60, deadline=None)
def test_any_bytes_as_a_manifest(tmp_path_factory, raw):
    d = tmp_path_factory.getbasetemp()/'bytes'; d.mkdir(exist_ok=True)
    (d/'manifest.json').write_bytes(raw)
    with pytest.raises(Damaged, match='manifest.json'): check_folder(d)

def test_folders_in_place_of_files(tmp_path):
    write(tmp_path/'x', 'w')
    (tmp_path/'x'/'a.json').unlink(); (tmp_path/'x'/'a.json').mkdir()
    with pytest.raises(Damaged, match='a.json'): check_folder(tmp_path/'x')
    with pytest.raises(Damaged, match='not there'): check_folder(tmp_path/'y')
    (tmp_path/'f').write_text('')
    with pytest.raises(Damaged, match='not a folder'): check_folder(tmp_path/'f')
    (tmp_path/'e').mkdir()
    with pytest.raises(Damaged, match='never finished'): check_folder(tmp_path/'e')

# --- the newest, latest, prune ---
def test_order_is_by_number_not_by_clock(tmp_path):
    for i, s in enumerate((100, 9, 10, 99)):
        write(tmp_path/f'step-{s}', str(s)); os.utime(tmp_path/f'step-{s}', (10**9 - s, 10**9 - s))
    (tmp_path/'step-101').write_text('a file'); (tmp_path/'step-102').symlink_to('nowhere'); (tmp_path/'notes').mkdir()
    found, passed = newest(tmp_path)
    assert found.name == 'step-100' and [p.name for p, _ in passed] == ['step-102', 'step-101']
    assert newest(tmp_path, 'epoch-*') == (None, []) and newest(str(tmp_path))[0] == found
    assert prune(tmp_path, keep=2) == ['step-10', 'step-9']
    assert newest(tmp_path)[0] == found and word(tmp_path/'step-99') == '99'

def test_prune_keeps_what_is_needed(tmp_path):
    for s in range(1, 7): write(tmp_path/f'step-{s}', str(s))
    point(tmp_path, 'step-2')
    for s in (6, 4): (tmp_path/f'step-{s}'/'a.json').write_text('"X"\n')  # as long, but not the same
    seen = []
    def look(name): seen.append((name, (tmp_path/'step-1').exists(), len(hidden(tmp_path))))
    assert prune(tmp_path, keep=2, on_point=look) == ['step-1']  # 5 and 3 are complete, 2 is latest
    assert seen == [('step-1 out of sight', False, 1), ('step-1 removed', False, 0)]
    assert prune(tmp_path, keep=4) == [] and prune(tmp_path, keep=1) == ['step-4', 'step-3']
    assert newest(tmp_path)[0].name == 'step-5'
    for bad in (0, -1):
        with pytest.raises(ValueError, match='at least one'): prune(tmp_path, keep=bad)

def test_point(tmp_path):
    write(tmp_path/'step-1', 'a')
    point(tmp_path, 'step-1')
    assert (tmp_path/'latest').read_text() == 'step-1\n'
    (tmp_path/'step-2').mkdir()
    for bad in ('step-2', 'step-3'):
        with pytest.raises(Damaged): point(tmp_path, bad)
    assert (tmp_path/'latest').read_text() == 'step-1\n' and hidden(tmp_path) == []

def test_a_damaged_replacement_falls_back_on_the_old_one(tmp_path):
    "Killed between the renames, and the new one does not survive the crash whole: the old one is read, and put back."
    write(tmp_path/'step-1', 'old')
    child(lambda: write(tmp_path/'step-1', 'new', on_point=lambda n: n == 'old aside' and die()))
    (next(tmp_path.glob('.tmp-*'))/'a.json').write_text('')
    found, passed = newest(tmp_path)
    assert word(found) == 'old' and passed
    assert any('undone' in what for _, what in sweep(tmp_path))
    assert word(tmp_path/'step-1') == 'old' and hidden(tmp_path) == []
    child(lambda: write(tmp_path/'step-1', 'new', on_point=lambda n: n == 'new in place' and die()))
    (tmp_path/'step-1'/'a.json').write_text('')  # as after a power cut
    assert word(newest(tmp_path)[0]) == 'old'
    assert any('undone' in what for _, what in sweep(tmp_path))
    assert word(tmp_path/'step-1') == 'old' and hidden(tmp_path) == []

# --- JSON ---
PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                     lambda o: st.lists(o) | st.dictionaries(st.text(), o), max_leaves=20)

@given(PLAIN.filter(lambda o: '\ud800' not in repr(o)))
@settings(max_examples=60, deadline=None)
def test_json_round_trip(tmp_path_factory, o):
    p = tmp_path_factory.getbasetemp()/'o.json'
    save_json(p, o)
    assert load_json(p) == o and json.loads(p.read_bytes()) == o

@pytest.mark.parametrize('bad,error,where', [
    ({'a': [1., math.nan]}, ValueError, r'\$\.a\[1\]'), ([math.inf], ValueError, r'\$\[0\]'), (-math.inf, ValueError, r'\$'),
    ({'a': {1: 2}}, TypeError, r'\$\.a.*1'), ({'a': torch.zeros(1)}, TypeError, r'\$\.a.*Tensor'), ({'a': {2}}, TypeError, 'set'),
    ([b'x'], TypeError, 'bytes'), ([print], TypeError, 'builtin')])
def test_json_says_where(tmp_path, bad, error, where):
    save_json(tmp_path/'o', 'old')
    with pytest.raises(error, match=where): save_json(tmp_path/'o', bad)
    assert load_json(tmp_path/'o') == 'old' and os.listdir(tmp_path) == ['o']

@pytest.mark.parametrize('raw', [b'', b'{', b'NaN', b'[Infinity]', b'-Infinity', b'1e999', b'\xff', b'{"a":1}}', b'['*10**5, b'9'*5000])
def test_damaged_json(tmp_path, raw):
    (tmp_path/'o.json').write_bytes(raw)
    with pytest.raises(Damaged, match='o.json'): load_json(tmp_path/'o.json')

def test_json_size(tmp_path):
    with open(tmp_path/'o.json', 'wb') as f: f.truncate(2**26 + 1)
    with pytest.raises(Damaged, match='too many'): load_json(tmp_path/'o.json')
    with pytest.raises(FileNotFoundError): load_json(tmp_path/'none.json')

def test_write_file(tmp_path):
    p = tmp_path/'o'
    for old in (False, True):
        with pytest.raises(ZeroDivisionError), write_file(p) as t: t.write_text('half'); 1/0
        assert os.listdir(tmp_path) == ['o']*old and (not old or p.read_text() == 'new')
        with write_file(p) as t: t.write_text('new')
    assert p.stat().st_mode & 0o777 == 0o666 & ~umask()

def umask(): m = os.umask(0); os.umask(m); return m

# --- tensors ---
def test_every_dtype_and_shape(tmp_path):
    tensors = {}
    for dtype in store.dtype_codes:
        for shape in ((), (0,), (1,), (3, 0, 2), (2, 3, 5)):
            t = torch.arange(math.prod(shape)).reshape(shape)
            tensors[f'{dtype}{shape}'] = t.bool() if dtype == torch.bool else t.to(dtype)
    tensors |= {'transposed': torch.arange(6.).reshape(2, 3).T, 'strided': torch.arange(9.)[::2], 'expanded': torch.ones(1).expand(4),
                'grad': torch.ones(2, requires_grad=True), 'nan': torch.tensor([math.nan, math.inf, -0.])}
    save_tensors(tmp_path/'t', tensors, meta={'step': 3, 'deep': {'x': [1, None]}})
    back, meta = load_tensors(tmp_path/'t')
    assert meta == {'step': 3, 'deep': {'x': [1, None]}} and back.keys() == tensors.keys()
    library = load_file(tmp_path/'t')
    for k, t in tensors.items():
        for o in (back[k], library[k]):
            assert o.dtype == t.dtype and o.shape == t.shape
            assert torch.equal(o.contiguous().reshape(-1).view(torch.uint8), t.detach().contiguous().reshape(-1).view(torch.uint8))

def test_same_bytes_as_the_library_and_always(tmp_path):
    t = {'b': torch.arange(3.), 'a': torch.ones(2, 2), 'c': torch.tensor([1, 2])}
    save_tensors(tmp_path/'1', t); save_tensors(tmp_path/'2', dict(reversed(t.items())))
    assert (tmp_path/'1').read_bytes() == (tmp_path/'2').read_bytes()
    note = json.dumps(dict(alias={}, meta={}))
    assert (tmp_path/'1').read_bytes() == library_save(t, metadata={'diffnb': note})

def test_ties(tmp_path):
    a, b, c = torch.randn(1000, 3), torch.zeros(0), torch.randn(3, 3)
    tensors = {'square': c, 'square T': c.T, 'x': a, 'y': a, 'z': a.detach(), 'flat': a.view(-1), 'part': a[:2], 'copy': a.clone(), 'T': a.T,
               'same bytes': a.view(torch.int32), 'e1': b, 'e2': torch.zeros(0)}
    assert ties(tensors) == {'y': 'x', 'z': 'x'}
    save_tensors(tmp_path/'t', tensors)
    back, _ = load_tensors(tmp_path/'t')
    assert back['x'] is back['y'] is back['z'] and back['copy'] is not back['x']
    for k, t in tensors.items(): assert torch.equal(back[k], t)
    assert ties(back) == ties(tensors)
    save_tensors(tmp_path/'one', {'x': a}); save_tensors(tmp_path/'three', {'x': a, 'y': a, 'z': a})
    assert (tmp_path/'three').stat().st_size - (tmp_path/'one').stat().st_size < 100

def test_foreign_files(tmp_path):
    save_file({'a': torch.ones(2)}, tmp_path/'t', metadata={'format': 'pt', 'who': 'else'})
    back, meta = load_tensors(tmp_path/'t')
    assert torch.equal(back['a'], torch.ones(2)) and meta == {'format': 'pt', 'who': 'else'}
    save_file({'a': torch.ones(2)}, tmp_path/'t')
    assert load_tensors(tmp_path/'t')[1] == {}

def test_loaded_tensors_do_not_hang_on_the_file(tmp_path):
    save_tensors(tmp_path/'t', {'a': torch.ones(10**6)})
    def action():
        a = load_tensors(tmp_path/'t')[0]['a']
        os.truncate(tmp_path/'t', 100)  # a mapped file would now end in SIGBUS
        assert a.sum() == 10**6
    assert child(action) == 0

@pytest.mark.parametrize('bad,what', [({'a': 1}, 'a is a int'), ({3: torch.zeros(1)}, "3 cannot be the name"),
    ({'__metadata__': torch.zeros(1)}, '__metadata__'), ({'a': torch.zeros(1, dtype=torch.complex64)}, 'a cannot.*complex64'),
    ({'a': torch.eye(2).to_sparse()}, 'a cannot.*sparse'), ({'a': torch.zeros(1, device='meta')}, 'a cannot.*meta')], ids=str)
def test_what_is_no_tensor(tmp_path, bad, what):
    with pytest.raises(Exception, match=what) as e: save_tensors(tmp_path/'t', bad)
    assert isinstance(e.value, TypeError) or 'type' in str(e.value).lower()
    assert os.listdir(tmp_path) == []

def test_meta_must_be_plain(tmp_path):
    with pytest.raises(ValueError, match=r'\$\.loss'): save_tensors(tmp_path/'t', {}, meta={'loss': math.nan})

def test_truncated_and_altered_tensors(tmp_path):
    "Without the manifest's help: every length is an error that names the file, and no byte raises anything else."
    save_tensors(tmp_path/'t', {'a': torch.ones(3), 'b': torch.ones(3), 'c': torch.zeros(2, 2).half()}, meta={'x': 1})
    good = (tmp_path/'t').read_bytes()
    for n in range(len(good)):
        (tmp_path/'t').write_bytes(good[:n])
        with pytest.raises(Damaged, match=str(tmp_path/'t')): load_tensors(tmp_path/'t')
    for i in range(0, len(good), 2):
        for bit in (1, 16):
            (tmp_path/'t').write_bytes(good[:i] + bytes([good[i] ^ bit]) + good[i+1:])
            try: load_tensors(tmp_path/'t')
            except Damaged as e: assert str(tmp_path/'t') in str(e)

def file_with(note, head=None):
    h = json.dumps({'__metadata__': {'diffnb': note}, 'a': dict(dtype='F32', shape=[1], data_offsets=[0, 4])}).encode()
    return (len(h) if head is None else head).to_bytes(8, 'little') + h + bytes(4)

@pytest.mark.parametrize('note', ['', '{', '[]', '3', '{"alias":{}}', '{"meta":{}}', '{"alias":{"b":"zz"},"meta":{}}',
                                  '{"alias":{"b":["a"]},"meta":{}}', '{"alias":[],"meta":{}}', '{"alias":{},"meta":3}'])
def test_bad_notes(tmp_path, note):
    (tmp_path/'t').write_bytes(file_with(note))
    with pytest.raises(Damaged, match=str(tmp_path/'t')): load_tensors(tmp_path/'t')

@pytest.mark.parametrize('head', [0, 1, 2**26 + 1, 2**40, 2**63, 2**64 - 1])
def test_header_size(tmp_path, head):
    (tmp_path/'t').write_bytes(file_with('{"alias":{},"meta":{}}', head))
    with pytest.raises(Damaged, match='a header of'): load_tensors(tmp_path/'t')

def test_read_manifest_is_fast_and_says_so(tmp_path):
    write(tmp_path/'x', 'w')
    (tmp_path/'x'/'a.json').write_text('"v"\n')
    assert read_manifest(tmp_path/'x')['format'] == 1
    with pytest.raises(Damaged, match='other content'): check_folder(tmp_path/'x')
