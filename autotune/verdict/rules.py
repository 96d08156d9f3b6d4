"""The table of wordings: what libraries, drivers, kernels and schedulers print when memory runs out, or does not.

Patterns are lower-case and matched against lower-cased text; a space stands for any white space, so that a message
wrapped by a terminal still matches. Every repetition is bounded or followed by something it cannot match, which keeps
matching linear. The first rule of the table that matches a line owns it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from autotune.values import Verdict


class Kind(StrEnum):
    """Families of wordings. What each means from the text alone is `KIND_VERDICT`."""

    DEVICE = "device allocation"
    PRINTED = "device allocation, printed by native code"  # exceptions right after it are its consequence
    BARE = "device allocation, caller unknown"  # raised by any CUDA call, also one that pins host memory
    ALLOCATION = "host allocation"  # by the dying process itself
    SHARED_MEMORY = "shared memory"
    HOST_KILL = "host kill"
    SUSPECT = "unexplained native failure"  # of memory, if the process was at its limit
    LIBRARY = "library failure"  # of memory, if the card was full
    CAPACITY = "capacity estimate"
    FAULT = "fault"
    LOST = "device lost"
    RESOURCE = "other resource"
    ERROR = "exception"
    KILL = "kill"
    FOLLOW = "consequence"
    WRAPPER = "wrapper"
    HANDLED = "handled"
    TALK = "talk"


KIND_VERDICT: dict[Kind, Verdict] = {
    Kind.DEVICE: Verdict.DEVICE_OOM,
    Kind.PRINTED: Verdict.DEVICE_OOM,
    Kind.BARE: Verdict.DEVICE_OOM,
    Kind.ALLOCATION: Verdict.HOST_OOM,
    Kind.SHARED_MEMORY: Verdict.HOST_OOM,
    Kind.HOST_KILL: Verdict.HOST_OOM,
    Kind.SUSPECT: Verdict.AMBIGUOUS,
    Kind.LIBRARY: Verdict.AMBIGUOUS,
    Kind.CAPACITY: Verdict.AMBIGUOUS,
    Kind.FAULT: Verdict.NOT_OOM,
    Kind.LOST: Verdict.NOT_OOM,
    Kind.RESOURCE: Verdict.NOT_OOM,
    Kind.ERROR: Verdict.NOT_OOM,
    Kind.KILL: Verdict.AMBIGUOUS,
    Kind.FOLLOW: Verdict.AMBIGUOUS,
    Kind.WRAPPER: Verdict.AMBIGUOUS,
    Kind.HANDLED: Verdict.NOT_OOM,
    Kind.TALK: Verdict.NOT_OOM,
}

MEMORY = frozenset({Kind.DEVICE, Kind.PRINTED, Kind.BARE, Kind.ALLOCATION, Kind.SHARED_MEMORY, Kind.HOST_KILL})
#: A way to die, as opposed to what follows from one or only talks of it.
CAUSES = MEMORY | {
    Kind.SUSPECT,
    Kind.LIBRARY,
    Kind.CAPACITY,
    Kind.FAULT,
    Kind.LOST,
    Kind.RESOURCE,
    Kind.ERROR,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One wording."""

    kind: Kind
    name: str
    pattern: re.Pattern[str]
    verdict: Verdict


def compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(" ", r"\s+"), re.MULTILINE)


def _rule(kind: Kind, name: str, pattern: str, verdict: Verdict | None = None) -> Rule:
    return Rule(kind, name, compiled(pattern), verdict or KIND_VERDICT[kind])


OOM = r"(?:out[-\s]of[-\s](?:the\s)?memory|\bcuda\sooms?\b|\booms?\b)"
_DEVICE = r"(?:cuda|hip|rocm|xpu|npu|mlu|musa|hpu|mps|gpu|vulkan|metal|sycl)"
_MAYBE_TALK = (
    r"(?:if|when|whenever|in\scase|to|helps?|avoid(?:s|ing)?|prevent(?:s|ing)?|against|reduces?|risks?|may|might|could"
    r"|can|likely|possible|potential(?:ly)?|common|typical(?:ly)?|usually|often|troubleshoot\w*|dealing|handl(?:e"
    r"|es|ing)"
    r"|fix(?:es|ing)?|solv(?:e|es|ing)|debug(?:ging)?|how|encounter\w*|hit|hitting|without|about|causes?|lead(?:s|ing)?"
    r"|run(?:s|ning)?\sinto|most|faq|see|until|before|for)"
)

RULES: tuple[Rule, ...] = (
    _rule(
        Kind.TALK,
        "a line of source code",
        r"^[^\S\n]*(?:(?:(?:el)?if|assert|except|catch|return|print)\b|#|//)(?![^\S\n]+(?:you|your|it|the|this|a)\b)"
        r"[^\n]{0,200}(?:out of memory|outofmemoryerror|\boom\b)",
    ),
    # --- Wordings that nothing else uses.
    _rule(
        Kind.DEVICE,
        "the device allocator's message",
        r"\b[a-z]{2,12}(?: backend)? out of (?:the )?memory[.:]?(?: tried to allocate|\s*\([^\n]{0,20}allocated)",
    ),
    _rule(Kind.DEVICE, "cudaMallocAsync's message", r"allocation on device(?: \d+)? would exceed allowed memory"),
    _rule(
        Kind.DEVICE,
        "cudaMallocAsync's message",
        r"(?:^|outofmemoryerror: |[!:] )allocation on device(?: \d+)?[^\S\n]{0,20}\.?[^\S\n]{0,20}$",
    ),
    _rule(Kind.DEVICE, "the XPU allocator's message", r"allocation is out of device memory"),
    _rule(Kind.DEVICE, "Metal refused the buffer", r"invalid buffer size: [\d.]+\s?[kmgt]i?b\b"),
    _rule(
        Kind.DEVICE,
        "Metal refused the buffer",
        r"attempting to allocate \d+ bytes which is greater than the maximum allowed buffer",
    ),
    _rule(Kind.DEVICE, "Metal ran out of memory", r"insufficient memory \(0+8|callbackerroroutofmemory"),
    _rule(Kind.DEVICE, "Composer at a microbatch of one", r"cuda out of memory\. the (?:train|eval) loop failed"),
    # --- A sentence that opens as documentation does.
    _rule(
        Kind.TALK,
        "only talks about memory",
        r"^[^\S\n]*(?:#{1,6}[^\S\n]|\*\*|q:|a:|faq)[^\n]{0,200}(?:\boom|memory|\b137\b|-9\b|\bkilled\b)",
    ),
    _rule(
        Kind.TALK,
        "only talks about memory",
        r"^[^\S\n*>\-]*(?:if|when|in case|how to|to (?:avoid|prevent|fix|reduce|save)|make sure|please note|tip"
        r"|note|hint)"
        r"\b[^\n]{0,200}(?:\boom|memory|\b137\b|-9\b|\bkilled\b)",
    ),
    _rule(Kind.TALK, "says that it is not out of memory", r"\bnot (?:an? )?(?:out[-\s]of[-\s]memory|oom\b)"),
    _rule(Kind.TALK, "says that it is no failure", r"the caller indicates that this is not a failure"),
    _rule(Kind.TALK, "a memory table", r"cuda ooms: \d"),
    _rule(Kind.TALK, "shared GPU memory in use: the driver may be spilling", r"^[^\n]{0,80}shared gpu memory [\d.]+/"),
    _rule(Kind.TALK, "a container's state", r"oomkilled[\"']?[:=]\s*false|oom_kill(?:_disable)?[^\S\n]+0\b"),
    # --- The host: kernel, container, scheduler.
    _rule(
        Kind.HOST_KILL,
        "the kernel's out-of-memory killer",
        r"out of memory: kill(?:ed)? process|memory cgroup out of memory|\boom-kill:|invoked oom-killer"
        r"|\boom-killer: |killed as a result of limit of"
        r"|oom_reaper: reaped|killed by (?:the )?(?:linux )?(?:kernel )?(?:oom|out-of-memory|cgroup)",
    ),
    _rule(
        Kind.HOST_KILL,
        "the scheduler saw an out-of-memory kill",
        r"\d oom[-_]kill events?|oom[-_]kill event|cgroup out-of-memory handler|\boom[-\s]?killed"
        r"|task [\d,\-]{1,80}: out of memory"
        r"|(?:^|\s)out_of_me(?:mory\b(?!:)|\+)|term_memlimit|exceeded (?:the )?(?:job |step |virtual "
        r"|resident )?memory limit"
        r"|exceeding (?:physical |virtual |its )?memory limits?|memory[^\n]{0,40} exceeded (?:its )?limit"
        r"|\b(?:mem|vmem|pmem|pvmem) [^\n]{0,40}exceeded limit",
    ),
    _rule(
        Kind.HOST_KILL,
        "the system ended it for its memory",
        r"(?:killed|terminated|evicted|evicting)[^\n]{0,60} due to (?:high )?memory|running low on memory"
        r"|low on resource: memory|memory pressure \(oom\)|systemd-oomd[^\n]{0,160}kill"
        r"|earlyoom[^\n]{0,160}(?:kill|sig)"
        r"|using all available ram|more memory than is available\. it has restarted|low virtual memory condition",
    ),
    _rule(
        Kind.HOST_KILL,
        "a job script saw its child killed while itself alive",
        r"slurm_script: line \d+:\s+\d+ killed\b",
    ),
    # --- The host: shared memory between processes.
    _rule(
        Kind.SHARED_MEMORY,
        "shared memory (/dev/shm) is full",
        r"killed by signal: bus error|insufficient shared memory|workers are out of shared memory"
        r"|error while creating shared memory segment|/dev/shm[^\n]{0,160}no space left"
        r"|no space left[^\n]{0,160}/dev/shm"
        r"|unable to (?:write to|resize) file <[^\n]{0,160}no space left",
    ),
    # --- Words that mislead.
    _rule(Kind.RESOURCE, "a library needs thread-local storage, not memory", r"in static tls block"),
    _rule(
        Kind.RESOURCE,
        "a kernel wants more on-chip resources than there are",
        r"outofresources\b|out of resources?: (?:shared|triton|tensor|register|thread)|too many resources requested"
        r"|uses too much shared (?:data|memory)|outofmemoryerror: out of resource",
    ),
    _rule(
        Kind.RESOURCE,
        "file descriptors",
        r"unable to open shared memory obj|too many open files|\berrno 24\b|received 0 items of ancdata",
    ),
    _rule(Kind.RESOURCE, "disk space", r"no space left on device|disk quota exceeded|\berrno 28\b"),
    _rule(
        Kind.RESOURCE,
        "a service's quota",
        r"resource_exhausted[^\n]{0,80}(?:quota|rate limit|message larger|too many requests)|rate limit exceeded",
    ),
    _rule(
        Kind.RESOURCE,
        "a configuration clash",
        r"expandable segments are not compatible|expandable_segments (?:is )?not supported"
        r"|unrecognized (?:cuda)?cachingallocator option|error in memory profiling",
    ),
    # --- The host: the process's own allocations.
    _rule(
        Kind.ALLOCATION,
        "pinned host memory",
        r"(?:cudahostalloc|cudahostregister|cudamallochost|hiphostmalloc|hiphostregister|cumemhostalloc|cumemallochost)"
        r"\b[^\n]{0,80}(?:fail|error|out of memory|cannot|unable)"
        r"|(?:could not|failed to|unable to|cannot|can't) (?:allocate|alloc|pin(?!\s')|page-?lock|register"
        r"|lock)[^\n]{0,60}"
        r"(?:pinned|page-?locked|host memory|cpu memory|system memory|\bram\b|on host\b)"
        r"|(?:pinned|page-?locked)(?: host)?(?: memory)?[^\n]{0,60}(?:fail|out of memory|could not|cannot|unable)",
    ),
    _rule(
        Kind.DEVICE,
        "RAPIDS' memory manager",
        r"bad_alloc:? (?:out_of_memory|cuda error|maximum pool size)|\brmm[^\n]{0,80}out_of_memory",
    ),
    _rule(
        Kind.ALLOCATION,
        "torch's CPU allocator",
        r"defaultcpuallocator:? (?:can't|cannot|not enough|out of)|enforce fail at [^\n]{0,200}(?:alloc_cpu"
        r"|cpuallocator)"
        r"|posix_memalign\(|not enough memory: you tried to allocate|buy new ram",
    ),
    _rule(
        Kind.ALLOCATION,
        "Windows' paging file is too small",
        r"(?:os\s?|win)error 1455\b|\berror 1455\b|paging file is too small",
    ),
    _rule(Kind.ALLOCATION, "Windows has no memory left", r"winerror (?:8|14|1450)\]|error code 1450\b"),
    _rule(
        Kind.ALLOCATION,
        "the system refused memory",
        r"\berrno 12\b|os error 12\)|error code 12 \(|cannot allocate memory|\benomem\b|unable to mmap \d|mmap failed"
        r"|virtual memory exhausted|not enough memory resources are available|failed to map segment from shared object",
    ),
    _rule(
        Kind.ALLOCATION,
        "C++ ran out of memory",
        r"std::bad_alloc\b(?! handler)|\bbad allocation\b|memory allocation of \d+ bytes failed"
        r"|malloc of size \d+ failed"
        r"|ggml_aligned_malloc: insufficient memory|failed to allocate cpu\w* buffer|unable to allocate cpu buffer",
    ),
    _rule(
        Kind.ALLOCATION,
        "Python ran out of memory",
        r"(?<!outof)(?<!outof_)memoryerror\b(?:[:('\"]|\s*$)"
        r"|unable to allocate [\d.]+\s?[kmgtp]?i?b(?:ytes)? for an array",
    ),
    _rule(
        Kind.ALLOCATION,
        "a managed heap is full",
        r"javascript heap out of memory|java heap space|gc overhead limit exceeded|could not reserve enough space for"
        r"|insufficient memory for the java runtime",
    ),
    _rule(Kind.ALLOCATION, "the XPU runtime has no host memory", r"_error_out_of_host_memory|erroroutofhostmemory"),
    _rule(
        Kind.ALLOCATION,
        "TensorFlow on the host",
        r"oom when allocating tensor(?:[^\n]|\n(?!\n)){0,300}?(?:device:cpu|allocator (?:mkl)?cpu\b|allocator cpu_)"
        r"|bytes on host: cuda_error_out_of_memory|pinned host memory of size",
    ),
    # --- The device: libraries that print, and other frameworks.
    _rule(
        Kind.DEVICE,
        "TensorFlow on the device",
        r"oom when allocating tensor(?:[^\n]|\n(?!\n)){0,300}?(?:device:gpu|device:xpu|device:tpu|allocator gpu"
        r"|gpu_\d_bfc)",
    ),
    _rule(
        Kind.LIBRARY,
        "TensorFlow does not say which memory",
        r"oom when allocating tensor|dst tensor is not initialized",
    ),
    _rule(
        Kind.LIBRARY,
        "TensorFlow's allocator, often before a smaller try",
        r"failed to alloc(?:ate)? [^\n]{0,80}cuda_error_out_of_memory|allocator \([^\n)]{1,20}\) ran out of memory",
    ),
    _rule(
        Kind.DEVICE,
        "XLA ran out of device memory",
        r"resource[_\s]?exhausted: [^\n]{0,120}?(?:out of memory|failed to allocate|error allocating"
        r"|attempting to allocate)",
    ),
    _rule(Kind.DEVICE, "CuPy's pool", r"out of memory allocating [\d,]+ bytes"),
    _rule(
        Kind.DEVICE,
        "Paddle on the device",
        r"out of memory error on (?:gpu|xpu|npu)|cannot allocate [^\n]{0,40}memory on (?:gpu|xpu|npu)",
    ),
    _rule(Kind.DEVICE, "TensorRT", r"requested amount of gpu memory|cuda runtime \(out of memory\)"),
    _rule(Kind.DEVICE, "Gaudi's allocator", r"pt_devmem[^\n]{0,120}allocation failed"),
    _rule(
        Kind.PRINTED,
        "the device allocator, as llama.cpp prints it",
        r"(?:cuda|hip|musa)malloc\w*(?: retry)? failed: out of memory"
        r"|(?:failed|unable) to allocate (?:cuda|rocm|hip|vulkan|metal|sycl|musa|cann)\w* buffer",
    ),
    _rule(Kind.LIBRARY, "llama.cpp's buffers", r"failed to allocate compute buffers?"),
    _rule(
        Kind.LIBRARY,
        "bitsandbytes' paged memory",
        r"\berror out of memory at line \d+ in file [^\n]{0,300}pythoninterface",
    ),
    _rule(
        Kind.PRINTED,
        "bitsandbytes printed it and exited",
        r"\berror out of memory at line \d+ in file",
    ),
    _rule(
        Kind.FAULT,
        "bitsandbytes printed it and exited",
        r"\berror [^\n]{5,120} at line \d+ in file [^\n]{0,300}\.(?:cu|cuh|c|cc|cpp|hip|mm)\b",
    ),
    _rule(Kind.PRINTED, "NCCL saw the card full", r"cuda failure (?:2 )?'?out of memory"),
    _rule(
        Kind.LIBRARY,
        "the driver's virtual memory calls",
        r"(?:cuda|hip) driver error: (?:out of memory|unknown)",
    ),
    _rule(
        Kind.LIBRARY,
        "the CUDA runtime does not say",
        r"cuda (?:runtime )?(?:error|failure)(?: \(?\d+\)?)?\s?:? '?unknown error",
    ),
    _rule(
        Kind.BARE,
        "the CUDA runtime",
        r"(?:cuda|hip|musa)(?: runtime| kernel)? error(?:\s?\(2\))?\s?:?\s*out of memory|\berror=2 : out of memory"
        r"|(?:cuda|hip) error 2\b|(?:cuda|hip) failed with error out of memory|triton error \[\w+\]: out of memory"
        r"|(?<!_)(?:hiperroroutofmemory|cudaerrormemoryallocation|cuda_error_out_of_memory|hip_error_out_of_memory)"
        r"|_error_out_of_device_memory|erroroutofdevicememory|cl_mem_object_allocation_failure",
    ),
    _rule(
        Kind.DEVICE,
        "no room for the key-value cache",
        r"no available memory for the cache blocks|kv cache is needed, which is larger than"
        r"|larger than the maximum number of tokens that can be stored in kv cache",
    ),
    # --- Failures that a full card is one reason for.
    _rule(
        Kind.CAPACITY,
        "an estimate before loading",
        r"some modules are dispatched on the cpu or the disk|free memory on device[^\n]{0,120}less than desired"
        r"|increase --mem-fraction-static|device_map[^\n]{0,80}not enough (?:gpu )?(?:memory|ram)",
    ),
    _rule(
        Kind.LIBRARY,
        "a CUDA library could not start or work",
        r"(?:cublas|cusolver|cusparse|hipblas|hipblaslt|hipsparse|hipsolver|curand|cufft|cudnn|miopen)"
        r"_?(?:status_?)?(?:alloc_?failed|allocation_?failed|not_?initialized|initialization_failed|internal_?error"
        r"|execution_?failed|mapping_?error|insufficient_resources|unknown_?error)|cudnn_status_not_supported"
        r"|rocblas_status_(?:memory_error|internal_error|invalid_handle)|cusolver error: \d"
        r"|(?:find a valid cudnn|unable to find an) (?:algorithm|engine)|could not create cudnn handle"
        r"|probably because cudnn failed to initialize|failed to create cublas handle",
    ),
    _rule(
        Kind.LIBRARY,
        "the allocator's own consistency check",
        r"nvml_success == r|handles_\.at\(i\)|internal assert failed at [^\n]{0,80}cachingallocator",
    ),
    _rule(
        Kind.LOST,
        "the XPU was lost, perhaps for its memory",
        r"(?:ur_result_error|pi_error|ze_result_error)_device_lost",
        Verdict.AMBIGUOUS,
    ),
    _rule(
        Kind.LIBRARY,
        "the device ran out of some resource",
        r"(?:ur_result_error|pi_error|cl)_out_of_resources|\[metal\] command buffer execution failed: internal error",
    ),
    _rule(
        Kind.LIBRARY,
        "an arena allocator that does not say whose memory",
        r"failed to allocate memory for requested buffer of size",
    ),
    _rule(
        Kind.SUSPECT,
        "a native library without its resources",
        r"could not (?:create|execute) a (?:primitive|memory)|can't start new thread|thread creation failed"
        r"|pthread_create failed|errno 11\] resource temporarily unavailable",
    ),
    # --- Faults.
    _rule(
        Kind.LOST,
        "the device is lost or failing",
        r"\becc error|eccuncorrectable|uncorrectable ecc|gpu is lost|fallen off the bus|devices are busy or unavailable"
        r"|devicesunavailable|vk_error_device_lost|dxgi_error_device_(?:removed|hung)|\bdevice lost\b"
        r"|gpu requires reset"
        r"|nvrm: xid|hsa_status_error_(?:exception|hardware)|gpu recovery action",
    ),
    _rule(
        Kind.FAULT,
        "a fault in a kernel or a call",
        r"device-side assert triggered|illegal memory access|an illegal instruction|unspecified launch failure"
        r"|misaligned address"
        r"|invalid configuration argument|invalid device function|no kernel image is available|named symbol not found"
        r"|memory access fault by gpu|driver version is insufficient|cuda failure (?!2\b|999\b)\d+"
        r"|cuda error (?!2\b|999\b)\d+\b"
        r"|cuda failure '(?!out of memory|unknown)|triton error \[\w+\]: (?!out of memory)"
        r"|(?:cuda|hip) driver error: (?!out of memory|unknown)\w"
        r"|(?:cuda|hip)(?: runtime| kernel)? error(?:\s?\(\d+\))?\s?:\s*(?!out of memory|unknown error|cublas"
        r"|cusolver|cusparse|cudnn"
        r"|cufft|curand|hipblas|an internal|\W)\w"
        r"|(?:malloc|free|realloc)\(\): [a-z]|double free or corruption|corrupted size vs|bad_array_new_length",
    ),
    # --- A command that never began.
    _rule(
        Kind.ERROR,
        "the command line was refused",  # argparse's words, then click's
        r"^[^\s:][^:\n]{0,200}: error: (?:unrecognized arguments|the following arguments are required|ambiguous option"
        r"|argument [^\n]{1,200}: (?:invalid|expected|not allowed|ignored|ambiguous))[^\n]*"
        r"|^error: (?:no such option|got unexpected extra argument|missing (?:option|argument)|invalid value for)",
    ),
    _rule(
        Kind.ERROR,
        "there is no such script or module",
        r"^[^\s:]{0,200}python[\d.]*: (?:can't open file|can't find '__main__'|no module named)[^\n]*",
    ),
    # --- Ends that another error caused, and wrappers around one.
    _rule(
        Kind.TALK,
        "only talks about memory",
        r"(?:usually|typically|often) (?:happens|means|indicates|caused|due)|are the most common",
    ),
    _rule(
        Kind.FOLLOW,
        "the other processes are being ended",
        r"closing signal sig|forcefull?y exiting via|signalexception: process \d+ got signal: (?!9\b)\d+",
        Verdict.NOT_OOM,
    ),
    _rule(
        Kind.KILL,
        "SIGKILL, by whom is not said",
        r"exit\s?code\W{0,4}-9\b|(?:return|exit) (?:code|status)\W{1,4}-9\b|exit status -9\b|\bsigkill\b|\bsignal:? 9\b"
        r"|(?:exit(?:ed)?|return(?:ed)?)[^\n]{0,30}(?:code|status)\W{0,12}137\b|exited \(137\)"
        r"|exitcode\W{0,4}137\b|error 137\b"
        r"|killed by signal: killed|^[^\S\n]*killed[^\S\n]*$|line \d+:\s+\d+ killed\b|\b\d+ killed\s{2,}|signal: killed"
        r"|got signal: 9\b",
    ),
    _rule(
        Kind.WRAPPER,
        "a search over batch sizes gave up",
        r"no executable batch size found|batch size autotuning failed",
    ),
    _rule(
        Kind.FOLLOW,
        "another process or rank failed first",
        r"childfailederror|calledprocesserror|processraisedexception|processexitedexception|raytaskerror"
        r"|brokenprocesspool"
        r"|terminatedworkererror|unhandled (?:cuda|system) error|ncclunhandledcudaerror|ncclsystemerror|ncclremoteerror"
        r"|watchdog (?:caught|thread|timeout)|collective operation timeout|remote process exited"
        r"|communicator was aborted"
        r"|store->get\(|recvvalue failed|diststoreerror|distnetworkerror|distbackenderror"
        r"|dataloader worker \(pid[^\n]{1,60}exited unexpectedly|caught \w+ in (?:replica|dataloader worker)"
        r"|exits with return code = [1-9]|exitcode\W{1,4}[1-9]|returned non-zero exit status [1-9]",
    ),
    _rule(
        Kind.FOLLOW,
        "a connection to another process ended",
        r"brokenpipeerror|connectionreseterror|connection reset by peer|connection closed by (?:remote )?peer"
        r"|^eoferror\b",
        Verdict.NOT_OOM,
    ),
    _rule(Kind.LIBRARY, "failed while pinning host memory", r"caught \w+ in pin memory thread"),
    _rule(
        Kind.FOLLOW,
        "the handler of an earlier error is itself broken",
        r"has no attribute ['\"]?\w*outofmemory",
        Verdict.NOT_OOM,
    ),
    # --- Sentences about memory.
    _rule(
        Kind.TALK,
        "only talks about memory",
        rf"\b{_MAYBE_TALK}\b[^\n.:!]{{0,100}}?{OOM}",
    ),
    _rule(
        Kind.TALK,
        "only talks about memory",
        rf"{OOM}[^\n.:!]{{0,40}} (?:may|might|can|usually|issues?|problems?|troubleshooting|tips?|guide"
        r"|prevention|detected)\b",
    ),
    _rule(
        Kind.TALK,
        "only talks about memory",
        r"\b(?:you (?:may|might|can|could|will|get|see|run)|if you|(?:may|might) (?:see|cause|lead|result|run|get"
        r"|hit|fail)"
        r"|such as|e\.g\.|for example|errors? like|common (?:errors?|problems?|issues?"
        rf"|causes?))\b[^\n]{{0,160}}?{OOM}",
    ),
    # --- Loose wordings, once talk is out of the way.
    _rule(
        Kind.DEVICE,
        "a device out-of-memory exception",
        r"(?:runtimeerror|outofmemoryerror"
        rf"|acceleratorerror)[:(]\s{{0,4}}['\"]{{0,2}}{_DEVICE}(?: backend)? out of memory",
    ),
    _rule(
        Kind.TALK,
        "only talks about memory",
        rf"\b(?:info|debug|warn|warning|hint|tip|note)\b[^\n]{{0,120}}?{OOM}",
    ),
    _rule(
        Kind.DEVICE,
        "a device out-of-memory error",
        rf"(?:error|exception|fatal|critical|failed|failure|fail)[^\n]{{0,3}}[\s:('\"\]"
        rf"|]{{1,6}}{_DEVICE}(?: backend)? {OOM}"
        rf"|^[^\S\n]*{_DEVICE}(?: backend)? {OOM}[^\S\n]*[.(]"
        r"|^[^\S\n]*(?:\[[^\]\n]{1,40}\]:?[^\S\n]*)?(?:error: )?torch\.(?:cuda\.)?outofmemoryerror\s*(?::|$|\()",
    ),
)

#: An exception's last line: "pkg.SomeError: message", whatever the class.
EXCEPTION_LINE = _rule(
    Kind.ERROR,
    "the exception",
    r"^[^\S\n]*(?:[|][^\S\n]*)?(?:\[[^\]\n]{1,40}\]:?[^\S\n]*)?(?:[a-z_]\w{0,60}\.){0,8}[a-z_]?\w{0,60}"
    r"(?:error|exception|interrupt|systemexit|timeout)(?=:|[^\S\n]*$)",
)

#: A memory error that the program itself caught and went on from.
HANDLED = _rule(
    Kind.HANDLED,
    "caught, and tried again",
    rf"(?:{OOM}|alloc\w* failed|failed to allocate)[^\n]{{0,160}}\b(?:retrying|re-?trying|trying again|will retry"
    r"|falling back"
    r"|skipping|skipped|recovering|recovered|continuing)\b"
    rf"|\b(?:retrying|falling back|skipping|recovering|attempting to recover)\b[^\n]{{0,80}}{OOM}"
    r"|retrying (?:with|without|at|using) (?:an? )?(?:smaller|lower|reduced|half|tiled|batch|micro|pipeline|fewer|less)"
    r"|(?:reduc|lower|halv|decreas|shrink|dropp)(?:ing"
    r"|ed) (?:the )?[\w-]{0,20}\s?[\w-]{0,20}\s?(?:micro)?batch[-_\s]?size(?: from \d+)? to:? \d"
    r"|batch size \d+ failed, trying batch size|batch size will be decreased",
)

#: What is said of memory running out, in whatever sentence.
PHRASE = compiled(
    r"\bout[-\s]of[-\s](?:the )?(?:(?:gpu|device|video|host|system|cpu) )?(?:memory|vram)\b|\boom\b|memory exhausted"
    r"|\b(?:insufficient|not enough|lack of) (?:\w{1,12} ){0,2}(?:memory|vram)\b"
    r"|\b(?:fail(?:ed|ure)? to|unable to|cannot|could not|can't) allocate [^\n]{0,60}\b(?:memory|bytes|vram|[kmg]i?b)\b"
    r"|\bmemory allocation (?:has )?(?:failed|failure|error)"
)
PHRASE_DEVICE = compiled(rf"\b(?:{_DEVICE}|vram|video|device|graphics|tpu)\w*\b")
PHRASE_HOST = compiled(r"\b(?:host|ram|cpu|swap|cgroup|system|physical|virtual|container|pod|kernel)\b")
PHRASE_ERROR = compiled(
    r"\b(?:\w*error|\w*exception|fatal|critical|fail(?:ed|ure)?|abort(?:ed|ing)?|panic\w*|crash(?:ed)?|killed"
    r"|died|unable|cannot)\b"
)

JOINER = compiled(r"during handling of the above exception|the above exception was the direct cause")
TRACEBACK = compiled(r"traceback \(most recent call last\)")
ASIDE = compiled(r"exception ignored (?:in|on)|exception in thread|error in atexit|error in sys\.excepthook")
#: A line of source under its frame, and rich's boxes: what they quote did not happen.
SOURCE_LINE = re.compile(
    r"^((?:\[[^\]\n]{1,40}\]:?)?[^\S\n]*)file \"[^\"\n]{1,400}\", line \d+[^\n]*\n(?P<source>\1[^\S\n]+[^\n]*)"
    r"|^(?P<box>│[^\n]*)",
    re.MULTILINE,
)
PINNING = compiled(r"pin memory thread|pin_memory\(|\.pin_memory\b|non_blocking\s?=\s?true")
