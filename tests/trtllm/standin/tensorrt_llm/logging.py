import logging


class Logger:
    def __init__(self):
        self._log = logging.getLogger("tensorrt_llm")
        self.info, self.warning = self._log.info, self._log.warning
        self.error, self.debug = self._log.error, self._log.debug
        self.warning_once = self._log.warning


logger = Logger()
