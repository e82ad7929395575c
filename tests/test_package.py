"What is installed: quick to import, light, complete."
import json, os, shutil, statistics, subprocess, sys, zipfile
import pytest
from conftest import ROOT

ENV = {k:v for k,v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')}
HEAVY = ['torchvision', 'matplotlib', 'ipywidgets', 'scipy', 'transformers', 'diffusers', 'lightning', 'nbdev', 'beartype']

def python(code, cwd, **env):
    "What a fresh interpreter prints, as JSON."
    res = subprocess.run([sys.executable, '-c', code], cwd=cwd, env={**ENV, **env}, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return json.loads(res.stdout)

def test_import_time(tmp_path):
    "`import diffnb` adds at most 0.3 s to `import torch`; so does the use of the first names, which imports the core."
    code = '''import json, sys, time, torch
t = time.perf_counter(); import diffnb; a = time.perf_counter()-t
t = time.perf_counter(); diffnb.create, diffnb.Gaussian; b = time.perf_counter()-t
print(json.dumps([a, b]))'''
    python(code, tmp_path) # compiles what is not yet compiled
    first, names = (statistics.median(o) for o in zip(*(python(code, tmp_path) for _ in range(5))))
    assert first<=.3, f'{first:.2f} s'
    assert names<=1, f'{names:.2f} s'

def test_light(tmp_path):
    "Neither the package nor the names of its core import what only some uses need."
    code = f'''import json, sys, torch
before = set(sys.modules)
import diffnb
bare = [o for o in set(sys.modules)-before if o.split('.')[0]!='diffnb' and o.split('.')[0] not in sys.stdlib_module_names]
diffnb.create, diffnb.presets, diffnb.sample, diffnb.Gaussian, diffnb.Masked, diffnb.grids, diffnb.guidance
print(json.dumps([bare, [o for o in {HEAVY} if o in set(sys.modules)-before]]))'''
    assert python(code, tmp_path)==[[], []]

def test_offered():
    "Every name that the package offers leads to something with a docstring, and it says so to `dir`."
    import diffnb
    for o in diffnb.__all__:
        assert getattr(diffnb, o).__doc__, o
        assert o in dir(diffnb)
    with pytest.raises(AttributeError, match='sampel'): diffnb.sampel

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from the sdist, which is built from what git would keep."
    src, out = tmp_path_factory.mktemp('src'), tmp_path_factory.mktemp('dist')
    git = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True)
    for o in filter(None, git.stdout.split('\0')):
        if not (ROOT/o).is_file(): continue
        (src/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/o, src/o)
    res = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, src], env=ENV, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    return next(out.glob('*.whl')), src

def test_wheel_complete(wheel):
    whl, src = wheel
    names = set(zipfile.ZipFile(whl).namelist())
    want = {f.relative_to(src).as_posix() for f in (src/'diffnb').rglob('*') if f.is_file()}
    assert want-names==set(), 'not in the wheel'
    assert {o.split('/')[0] for o in names-want}=={next(iter(names-want)).split('/')[0]}, 'more than the package and its metadata'

def test_wheel_works(wheel, tmp_path):
    "Unpacked elsewhere, its names work, its metadata are those of settings.ini, and its licence is in it."
    zipfile.ZipFile(wheel[0]).extractall(tmp_path/'site')
    code = '''import json, sys, importlib.metadata as m
import diffnb
d = m.metadata('diffnb')
print(json.dumps([diffnb.__file__, diffnb.__version__, d['Version'], d['Requires-Python'], sorted(d.get_all('Provides-Extra')), len(diffnb.presets())]))'''
    file, version, meta, py, extras, n = python(code, tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert file.startswith(str(tmp_path)) and version==meta and py=='>=3.11' and n
    assert {'all', 'dev'} <= set(extras)
    assert list((tmp_path/'site').glob('*.dist-info/**/LICENSE'))

def test_extras_named(tmp_path):
    "Every extra that an error names is one that settings.ini has."
    import configparser, re
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    have = {k.removesuffix('_requirements') for k in cfg['DEFAULT'] if k.endswith('_requirements')}
    named = {m for f in (ROOT/'diffnb').rglob('*.py') for m in re.findall(r"\bneed\('[\w.]+', '(\w+)'\)", f.read_text('utf-8'))}
    assert named and named<=have, named-have
