// A call in a CUDA graph.
#pragma once

#include <string>
#include <vector>

#include "gpu/device_memory.hpp"

namespace flashdelta::testing {

// A captured call, ready to be replayed.
class Graph {
 public:
  // Global mode: whatever in this thread allocates or synchronises meanwhile is an error of that call.
  template <class AnyCall>
  Graph(AnyCall& call, cudaStream_t stream) {
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    error_ = call.launch(stream);
    check_cuda(cudaStreamEndCapture(stream, &graph_), "cudaStreamEndCapture");
    check_cuda(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  [[nodiscard]] const std::string& error() const { return error_; }
  void replay(cudaStream_t stream) const { check_cuda(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch"); }

  [[nodiscard]] std::vector<cudaGraphNodeType> node_types() const {
    std::size_t count = 0;
    check_cuda(cudaGraphGetNodes(graph_, nullptr, &count), "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> nodes(count);
    check_cuda(cudaGraphGetNodes(graph_, nodes.data(), &count), "cudaGraphGetNodes");
    std::vector<cudaGraphNodeType> types(count);
    for (std::size_t i = 0; i < count; ++i) check_cuda(cudaGraphNodeGetType(nodes[i], &types[i]), "cudaGraphNodeGetType");
    return types;
  }

 private:
  std::string error_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace flashdelta::testing
