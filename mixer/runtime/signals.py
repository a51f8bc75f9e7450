"""The signals that stop a run: Ctrl-C, SIGTERM, SIGHUP, and SIGUSR1 (Slurm's --signal=USR1)."""
import os
import signal
import subprocess

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stop:
    """Inside `with`, the first signal sets `signum`: the loop ends its step, saves and exits.

    A second Ctrl-C ends the process at once. Other signals often come twice: `timeout` sends two,
    and so does a terminal that closes. Ignored signals stay ignored, as under nohup.
    """

    def __init__(self):
        self.signum, self.child = 0, None

    def __enter__(self):
        self.before = {signum: signal.signal(signum, self) for signum in STOPPING
                       if signal.getsignal(signum) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __call__(self, signum, frame):
        if self.child:
            self.child.send_signal(signum)
        if self.signum and signum == signal.SIGINT:
            os._exit(128 + signum)
        self.signum = self.signum or signum

    def exit_code_of(self, command: list[str]) -> int:
        """Run a command, which gets the signals, too. Its exit code, as a shell has it."""
        # in a session of its own: Ctrl-C in a terminal reaches this process alone
        self.child = subprocess.Popen(command, start_new_session=True)
        if self.signum:  # it came before there was a child
            self.child.send_signal(self.signum)
        code = self.child.wait()
        self.child = None
        return code if code >= 0 else 128 - code
