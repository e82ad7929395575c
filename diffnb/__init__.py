"Diffusion models for images and text, one notebook at a time. Names are imported when they are first used."
__version__ = "0.1.0"

import importlib

_names = {'create': 'core', 'presets': 'core', 'save': 'saving', 'load': 'saving', 'sample': 'samplers', 'fit': 'train.loop',
          'load_pipeline': 'hub.pipelines', 'Gaussian': 'process.gaussian', 'Masked': 'process.masked'}
_modules = ('schedules', 'grids', 'samplers', 'guidance')
__all__ = [*_names, *_modules]

def __getattr__(name):
    if name in _modules: return importlib.import_module(f'diffnb.{name}')
    if name in _names: return getattr(importlib.import_module(f'diffnb.{_names[name]}'), name)
    raise AttributeError(f'module diffnb has no attribute {name!r}')

def __dir__(): return sorted([*globals(), *__all__])
