"""What a server will hold and gain, before anything is served: ``python -m kara_sglang.plan``.

``launch`` reads the command line as the launcher will, ``memory`` divides the GPU's memory as SGLang
and the plugin do, ``load`` says how many requests fit, and ``report`` says it.
"""
