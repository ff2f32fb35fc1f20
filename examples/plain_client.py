"""An edit with nothing but tritonclient: python examples/plain_client.py localhost:8001 CLIP "PROMPT" frames.npy"""

import sys
from queue import Queue

import numpy as np
import tritonclient.grpc as triton

url, clip, prompt, out = sys.argv[1:]
answers: Queue = Queue()
options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
if url.startswith(("localhost:", "127.")):  # gRPC asks the proxy of $http_proxy for this machine, too
    options.append(("grpc.enable_http_proxy", 0))
client = triton.InferenceServerClient(url, channel_args=options)
client.start_stream(lambda result, error: answers.put((result, error)))
texts = {"clip": clip, "prompt": prompt}
inputs = [triton.InferInput(name, [1], "BYTES").set_data_from_numpy(np.array([texts[name]], object)) for name in texts]
client.async_stream_infer("tune_a_video_stream", [*inputs])
parts, stage = [], ""
while stage != "done":  # progress comes first; then the frames, all of them, or with the stage render the next ones
    result, error = answers.get()
    if error:
        sys.exit(str(error))
    failure = result.as_numpy("error")
    if failure is not None:
        sys.exit(": ".join(text.decode() for text in failure))
    stage = result.as_numpy("stage")[0].decode()
    print(stage, result.as_numpy("step")[0], "of", result.as_numpy("steps")[0])
    if (frames := result.as_numpy("frames")) is not None:
        parts.append(frames)  # uint8 (prompts, f, H, W, 3)
client.stop_stream()
np.save(out, np.concatenate(parts, axis=1))
