// The sparse node and the attention as OpenVINO operators in C++: no Python, and no interpreter lock, in a call.
// An accelerator only: it is bound to the OpenVINO whose headers it was compiled with, and where it
// does not load, lpvit_engines/openvino_node.py has the same operator in Python.
//
// The layer itself belongs to Python (lpvit_engines/native.py), which packs it and frees it after
// the compiled model; its address and that of lpvit_run travel as attributes. They also keep
// OpenVINO from merging two nodes on one input, since no two layers share an address.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>

#include <cmath>

#include "layer.h"

namespace {

class BlockSparseLinear : public ov::op::Op {
public:
    OPENVINO_OP("BlockSparseLinear", "lpvit");

    BlockSparseLinear() = default;

    void validate_and_infer_types() override {
        auto shape = get_input_partial_shape(0);
        if (m_out_features > 0) shape[shape.size() - 1] = m_out_features;
        // A layer in bfloat16 takes float32 too, and answers in what it was given.
        set_output_type(0, m_prepared ? get_input_element_type(0) : ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto copy = std::make_shared<BlockSparseLinear>();
        copy->m_prepared = m_prepared;
        copy->m_run = m_run;
        copy->m_layer = m_layer;
        copy->m_threads = m_threads;
        copy->m_out_features = m_out_features;
        copy->set_arguments(inputs);
        copy->constructor_validate_and_infer_types();
        return copy;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("run", m_run);
        visitor.on_attribute("layer", m_layer);
        visitor.on_attribute("threads", m_threads);
        visitor.on_attribute("out_features", m_out_features);
        visitor.on_attribute("prepared", m_prepared);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        ov::Shape shape = inputs[0].get_shape();
        const std::size_t tokens = ov::shape_size(shape) / shape.back();
        shape.back() = static_cast<std::size_t>(m_out_features);
        if (outputs[0].get_shape() != shape) outputs[0].set_shape(shape);
        const auto* layer = reinterpret_cast<const LpvitLayer*>(m_layer);
        const auto* threads = reinterpret_cast<const LpvitThreads*>(m_threads);
        if (m_prepared)
            return reinterpret_cast<decltype(&lpvit_run_prepared)>(m_run)(
                       layer, threads, inputs[0].data(), static_cast<int64_t>(tokens),
                       outputs[0].data(),
                       inputs[0].get_element_type() == ov::element::bf16 ? 1 : 0) == 0;
        reinterpret_cast<decltype(&lpvit_run)>(m_run)(
            layer, threads, static_cast<const float*>(inputs[0].data()),
            static_cast<int64_t>(tokens), static_cast<float*>(outputs[0].data()));
        return true;
    }

private:
    int64_t m_run = 0;
    int64_t m_layer = 0;
    int64_t m_threads = 0;
    int64_t m_out_features = 0;
    int64_t m_prepared = 0;  // 1: m_run is lpvit_run_prepared, of bfloat16 or int8
};

// Attention in a network with sparse layers; lpvit_engines/openvino_attention.py says where. It
// belongs to nobody: kernel and functions live as long as the library.
class Attention : public ov::op::Op {
public:
    OPENVINO_OP("Attention", "lpvit");

    Attention() = default;

    void validate_and_infer_types() override {
        auto shape = get_input_partial_shape(0);
        if (m_heads > 0) shape[shape.size() - 1] = m_heads * m_head_dim;
        set_output_type(0, ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto copy = std::make_shared<Attention>();
        copy->m_run = m_run;
        copy->m_kernel = m_kernel;
        copy->m_threads = m_threads;
        copy->m_heads = m_heads;
        copy->m_head_dim = m_head_dim;
        copy->set_arguments(inputs);
        copy->constructor_validate_and_infer_types();
        return copy;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("run", m_run);
        visitor.on_attribute("kernel", m_kernel);
        visitor.on_attribute("threads", m_threads);
        visitor.on_attribute("heads", m_heads);
        visitor.on_attribute("head_dim", m_head_dim);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape shape = inputs[0].get_shape();  // (batch, tokens, 3 * heads * head_dim)
        const auto tokens = static_cast<int64_t>(shape[1]);
        const int64_t width = m_heads * m_head_dim;
        const ov::Shape to{shape[0], shape[1], static_cast<std::size_t>(width)};
        if (outputs[0].get_shape() != to) outputs[0].set_shape(to);
        const auto* qkv = static_cast<const float*>(inputs[0].data());
        auto* out = static_cast<float*>(outputs[0].data());
        for (std::size_t image = 0; image < shape[0]; ++image) {
            const int32_t failed = reinterpret_cast<decltype(&lpvit_attention)>(m_run)(
                reinterpret_cast<const void*>(m_kernel),
                reinterpret_cast<const LpvitThreads*>(m_threads), qkv + image * tokens * 3 * width,
                tokens, static_cast<int32_t>(m_heads), static_cast<int32_t>(m_head_dim),
                1.0f / std::sqrt(static_cast<float>(m_head_dim)), out + image * tokens * width);
            if (failed) return false;
        }
        return true;
    }

private:
    int64_t m_run = 0;
    int64_t m_kernel = 0;
    int64_t m_threads = 0;
    int64_t m_heads = 0;
    int64_t m_head_dim = 0;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<BlockSparseLinear>>(),
     std::make_shared<ov::OpExtension<Attention>>()}));

extern "C" int32_t lpvit_interface() { return LPVIT_INTERFACE; }
