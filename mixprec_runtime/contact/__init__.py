"""Every name of SGLang's that mixprec uses and that may move, and the check that the installed SGLang has them.

:mod:`.names` has the table of names, :mod:`.flags` that of arguments of the server, :mod:`.check` compares them with
the installed SGLang. Nothing here imports SGLang when it is imported.
"""
