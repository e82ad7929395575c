"""Run notebooks in a real kernel, store their outputs and clean them: the same bytes at every run.

    python tools/run_nbs.py                        # every notebook
    python tools/run_nbs.py nbs/01_viz.ipynb       # one
    python tools/run_nbs.py --flags slow           # also the cells marked `#| slow`
    python tools/run_nbs.py --check nbs/80_tour.ipynb  # write nothing; exit 1 where the stored outputs differ

What `nbdev_test` skips is skipped here too and keeps its stored output: cells with `#| eval: false`, and cells with a
flag listed in `tst_flags` of settings.ini. A widget, whose ids are random, is replaced by the picture it showed first.
"""
import argparse, json, os, re, shutil, sys, tempfile, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives

VIEW, STATE = (f'application/vnd.jupyter.widget-{o}+json' for o in ('view', 'state'))
NOTE = '*Run this notebook in JupyterLab to move the controls.*'

def skipped(cell, flags):
    "Is this a code cell that is not to run: `eval: false`, one of `flags`, or the export at the end?"
    d = extract_directives(cell, remove=False)
    return d.get('eval:', [''])[0].lower()=='false' or bool(flags & d.keys()) or 'nbdev_export()' in cell.source

class Client(NotebookClient):
    "A notebook client that leaves the cells to be skipped as they are."
    flags = frozenset()
    async def async_execute_cell(self, cell, *args, **kwargs):
        if cell.cell_type=='code' and skipped(cell, self.flags): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)

def pictures(state, mid, seen):
    "The outputs held by the Output widgets at and below the widget `mid`, in order."
    if mid in seen or mid not in state: return []
    seen.add(mid)
    st = dict(state[mid]['state'])
    held = st.pop('outputs', []) if state[mid]['model_name']=='OutputModel' else []
    below = re.findall(r'IPY_MODEL_(\w+)', json.dumps(st))
    return list(held) + [o for k in below for o in pictures(state, k, seen)]

def still(nb):
    "Replace each live widget by a note and the pictures it showed first."
    state = nb.metadata.pop('widgets', {}).get(STATE, {}).get('state', {})
    for c in nb.cells:
        if c.cell_type!='code': continue
        outs = []
        for o in c.outputs:
            if VIEW not in o.get('data', {}): outs.append(o); continue
            outs.append(nbformat.v4.new_output('display_data', {'text/markdown': NOTE, 'text/plain': NOTE}))
            outs += [nbformat.from_dict(p) for p in pictures(state, o['data'][VIEW]['model_id'], set())]
        c.outputs = outs

def run(src, dst, flags, timeout=600):
    "Execute the notebook `src` in its own folder and write it, with outputs and cleaned, to `dst`."
    nb = nbformat.read(src, as_version=4)
    nb.metadata.pop('widgets', None)
    client = Client(nb, timeout=timeout, kernel_name='python3', coalesce_streams=True,
                    resources={'metadata': {'path': str(src.parent)}})
    client.flags = flags
    client.execute()
    still(nb)
    with tempfile.TemporaryDirectory() as d: # a run that is stopped leaves the notebook as it was
        tmp = Path(d)/src.name
        nbformat.write(nb, tmp)
        nbdev_clean.__wrapped__(str(tmp))
        shutil.copyfile(tmp, dst)

def one(f, flags, check, timeout):
    "Run the notebook `f`; with `check` compare with what is stored. Returns what is wrong, or an empty string."
    t = time.time()
    try:
        with tempfile.TemporaryDirectory() as d:
            run(f, Path(d)/f.name, flags, timeout)
            new = (Path(d)/f.name).read_bytes()
    except CellExecutionError as e: bad = str(e)
    else:
        same = new==f.read_bytes()
        bad = 'the stored outputs are not what a run gives: run tools/run_nbs.py' if check and not same else ''
        if not check and not same: f.write_bytes(new)
    print(f'{f}: {time.time()-t:.1f} s{": FAILED" if bad else ""}', flush=True)
    return f'{f}: {bad}' if bad else ''

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('paths', nargs='*', type=Path, help='notebooks; all of them if none is named')
    p.add_argument('--flags', default='', help='flags of settings.ini whose cells are to run, such as "slow net"')
    p.add_argument('--check', action='store_true', help='write nothing, fail where stored outputs differ')
    p.add_argument('--timeout', type=int, default=600, help='seconds a cell may take')
    a = p.parse_args()
    os.environ['PYTHONHASHSEED'] = '0'
    skip = frozenset(get_config().tst_flags.split()) - set(a.flags.split())
    bad = [one(Path(f), skip, a.check, a.timeout) for f in a.paths or sorted(nbglob(as_path=True))]
    sys.exit('\n'.join(filter(None, bad)) or None)

if __name__=='__main__': main()
