{{/* What a server's pod is made of; each takes {"root", "pool"} with a pool of pdcoord.resolved. */}}

{{/* Labels of a server's pods, which the coordinator and routers of llm-d's kind read. */}}
{{- define "pdcoord.engineLabels" -}}
llm-d.ai/inference-serving: "true"
llm-d.ai/role: {{ .pool.role | quote }}
llm-d.ai/model: {{ include "pdcoord.slug" .pool.model | quote }}
llm-d.ai/engine-type: {{ .pool.engine | quote }}
llm-d.ai/accelerator-vendor: {{ .pool.vendorName | quote }}
{{- if ne .pool.role "prefill" }}
# Takes whole requests: what a Gateway may send to.
pdcoord.io/entry: "true"
{{- end }}
{{- end -}}

{{/* Annotations that tell the coordinator the ports of a pod. */}}
{{- define "pdcoord.engineAnnotations" -}}
pdcoord.io/port: {{ ternary .pool.sidecarPort .pool.enginePort .pool.hasSidecar | int | quote }}
{{- if .pool.hasSidecar }}
pdcoord.io/metrics-port: "9400"
{{- end }}
{{- if and (eq .pool.connector "pdcoord") (ne .pool.role "decode") }}
pdcoord.io/kv-port: "14579"
{{- end }}
{{- if and (eq .pool.connector "sglang") (eq .pool.role "prefill") }}
pdcoord.io/bootstrap-port: "8998"
{{- end }}
{{- if eq (include "pdcoord.hasKvEvents" .) "true" }}
pdcoord.io/kv-events-port: "5557"
pdcoord.io/kv-events-replay-port: "5558"
{{- end }}
{{- end -}}

{{- define "pdcoord.hasKvEvents" -}}
{{- if and (eq (dig "policy" "model" "prefix" "mode" "approximate" .pool.model) "precise") (not .pool.isAdopted) -}}true{{- end -}}
{{- end -}}

{{- define "pdcoord.kvEventsConfig" -}}
{{- $config := dict "enable_kv_cache_events" true "publisher" "zmq" "endpoint" "tcp://*:5557" "replay_endpoint" "tcp://*:5558" -}}
{{- $config | toJson -}}
{{- end -}}

{{/* --kv-transfer-config of a vLLM server. */}}
{{- define "pdcoord.kvTransferConfig" -}}
{{- $root := .root -}}{{- $pool := .pool -}}
{{- if eq $pool.connector "pdcoord" -}}
  {{- dict "kv_connector" "PdcoordConnector" "kv_connector_module_path" "transfer.engines.vllm.connector" "kv_role" (ternary "kv_producer" "kv_both" (eq $pool.role "prefill")) "kv_load_failure_policy" "recompute" "kv_port" 14579 "kv_connector_extra_config" (include "pdcoord.agentSettings" . | fromJson) | toJson -}}
{{- else -}}
  {{- dict "kv_connector" "NixlConnector" "kv_role" "kv_both" "kv_buffer_device" $pool.vendor.bufferDevice "kv_connector_extra_config" (dict "kv_lease_duration" (int $root.Values.pd.leaseSeconds)) | toJson -}}
{{- end -}}
{{- end -}}

{{/* The transfer agent's settings; its address and key come by the environment. */}}
{{- define "pdcoord.agentSettings" -}}
{{- $own := dict "backends" .root.Values.transfer.backends "staging_bytes" (int64 .root.Values.pd.stagingBytes) "lease_s" (float64 .root.Values.pd.leaseSeconds) -}}
{{- merge $own .root.Values.transfer.settings | toJson -}}
{{- end -}}

{{- define "pdcoord.engineArgs" -}}
{{- $root := .root -}}{{- $pool := .pool -}}{{- $model := $pool.model -}}
{{- $dtype := default "bfloat16" $pool.layout.dtype -}}
{{- $context := dig "limits" "context_tokens_max" 0 $pool.pool | int64 -}}
{{- $args := list -}}
{{- if eq $pool.engine "vllm" -}}
  {{- $args = list (default $model.name $model.source) (printf "--served-model-name=%s" $model.name) "--host=0.0.0.0" (printf "--port=%d" (int $pool.enginePort)) (printf "--block-size=%d" (int $pool.blockTokens)) (printf "--tensor-parallel-size=%d" (int $pool.tensorParallel)) -}}
  {{- if hasPrefix "fp8" $dtype -}}
    {{- $args = append $args (printf "--kv-cache-dtype=%s" (ternary "fp8_e5m2" "fp8_e4m3" (eq $dtype "fp8_e5m2"))) -}}
  {{- else -}}
    {{- $args = append $args (printf "--dtype=%s" $dtype) -}}
  {{- end -}}
  {{- if $context -}}{{- $args = append $args (printf "--max-model-len=%d" $context) -}}{{- end -}}
  {{- if has $pool.connector (list "pdcoord" "nixl") -}}
    {{- $args = append $args (printf "--kv-transfer-config=%s" (include "pdcoord.kvTransferConfig" .)) -}}
  {{- end -}}
  {{- if gt (int $pool.size) 1 -}}
    {{- $args = concat $args (list (printf "--nnodes=%d" (int $pool.size)) "--node-rank=$(LWS_WORKER_INDEX)" "--master-addr=$(LWS_LEADER_ADDRESS)") -}}
    {{- if .isWorker -}}{{- $args = append $args "--headless" -}}{{- end -}}
  {{- end -}}
{{- else -}}
  {{- $args = list (printf "--model-path=%s" (default $model.name $model.source)) (printf "--served-model-name=%s" $model.name) "--host=0.0.0.0" (printf "--port=%d" (int $pool.enginePort)) (printf "--page-size=%d" (int $pool.blockTokens)) (printf "--tp-size=%d" (int $pool.tensorParallel)) "--enable-metrics" -}}
  {{- if hasPrefix "fp8" $dtype -}}
    {{- $args = append $args (printf "--kv-cache-dtype=%s" (ternary "fp8_e5m2" "fp8_e4m3" (eq $dtype "fp8_e5m2"))) -}}
  {{- else -}}
    {{- $args = append $args (printf "--dtype=%s" $dtype) -}}
  {{- end -}}
  {{- if $context -}}{{- $args = append $args (printf "--context-length=%d" $context) -}}{{- end -}}
  {{- if eq $pool.connector "sglang" -}}
    {{- $args = concat $args (list (printf "--disaggregation-mode=%s" $pool.role) "--disaggregation-transfer-backend=nixl" "--disaggregation-bootstrap-port=8998") -}}
  {{- end -}}
{{- end -}}
{{- if eq (include "pdcoord.hasKvEvents" .) "true" -}}
  {{- $args = append $args (printf "--kv-events-config=%s" (include "pdcoord.kvEventsConfig" .)) -}}
{{- end -}}
{{- if eq $pool.engine "vllm" -}}{{- $args = concat $args $pool.vendor.args -}}{{- end -}}
{{- concat $args (default list $pool.pool.args) | toYaml -}}
{{- end -}}

{{- define "pdcoord.engineEnv" -}}
{{- $root := .root -}}{{- $pool := .pool -}}
{{- $hasRdma := gt (dig "rdma" "count" 0 $pool.pool | int) 0 -}}
{{- $env := dict "HOME" "/cache/home" "USER" "pdcoord" "XDG_CACHE_HOME" "/cache" "TRITON_CACHE_DIR" "/cache/triton" "TORCHINDUCTOR_CACHE_DIR" "/cache/inductor" "HF_HOME" "/models" "TMPDIR" "/tmp" -}}
{{- if eq $pool.engine "vllm" -}}
  {{- $env = merge (dict "VLLM_CACHE_ROOT" "/cache/vllm" "VLLM_CONFIG_ROOT" "/cache/vllm-config" "VLLM_NO_USAGE_STATS" "1") $env -}}
  {{- with $pool.layout.order -}}
    {{- if has . (list "HND" "NHD") -}}{{- $_ := set $env "VLLM_KV_CACHE_LAYOUT" . -}}{{- end -}}
  {{- end -}}
{{- end -}}
{{- if ne $pool.connector "none" -}}
  {{- $env = merge (deepCopy (ternary $pool.vendor.rdmaEnv $pool.vendor.tcpEnv $hasRdma)) $env -}}
{{- end -}}
{{- if eq $pool.connector "nixl" -}}{{- $_ := set $env "VLLM_NIXL_SIDE_CHANNEL_PORT" "5600" -}}{{- end -}}
{{- if eq $pool.connector "pdcoord" -}}
  {{- $_ := set $env "PYTHONPATH" "/pdcoord" -}}
  {{- $_ := set $env "PDCOORD_KV_KEY_FILE" "/etc/pdcoord/keys/kv" -}}
{{- end -}}
{{- $env = merge (deepCopy (default dict $pool.pool.env)) (deepCopy $pool.vendor.env) $env -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- if eq $pool.engine "vllm" }}
- {name: VLLM_HOST_IP, value: $(POD_IP)}
{{- else }}
- {name: SGLANG_HOST_IP, value: $(POD_IP)}
{{- end }}
{{- if eq $pool.connector "nixl" }}
- {name: VLLM_NIXL_SIDE_CHANNEL_HOST, value: $(POD_IP)}
{{- end }}
{{- if eq $pool.connector "pdcoord" }}
- {name: PDCOORD_KV_ADVERTISE_HOST, value: $(POD_IP)}
{{- end }}
{{- with $pool.model.huggingFaceToken }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ default "HF_TOKEN" .key | quote }}}}
{{- end }}
{{- range $name, $value := $env }}
- {name: {{ $name | quote }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{- define "pdcoord.engineResources" -}}
{{- $pool := .pool -}}
{{- $limits := dict -}}
{{- if $pool.vendor.resource -}}{{- $_ := set $limits $pool.vendor.resource ($pool.accelerators | int | toString) -}}{{- end -}}
{{- $count := dig "rdma" "count" 0 $pool.pool | int -}}
{{- if gt $count 0 -}}{{- $_ := set $limits (default $pool.vendor.rdmaResource (dig "rdma" "resource" "" $pool.pool)) ($count | toString) -}}{{- end -}}
{{- $given := default dict $pool.pool.resources -}}
{{- $limits = merge (deepCopy (default dict $given.limits)) $limits -}}
{{- $requests := merge (deepCopy (default dict $given.requests)) (dict "cpu" "4" "memory" "16Gi") -}}
{{- dict "requests" $requests "limits" $limits | toYaml -}}
{{- end -}}

{{/* The engine's container; {"isWorker"} for the further pods of a server over several. */}}
{{- define "pdcoord.engineContainer" -}}
{{- $root := .root -}}{{- $pool := .pool -}}
{{- $hasRdma := gt (dig "rdma" "count" 0 $pool.pool | int) 0 -}}
name: engine
image: {{ include "pdcoord.image" (dict "root" $root "image" $pool.image "registry" $root.Values.global.engineImageRegistry) }}
imagePullPolicy: {{ default "IfNotPresent" $pool.image.pullPolicy }}
{{- if $pool.pool.command }}
command: {{ toJson $pool.pool.command }}
{{- else if eq $pool.engine "vllm" }}
command: [vllm, serve]
{{- else }}
command: [python3, -m, sglang.launch_server]
{{- end }}
args:
  {{- if $pool.pool.command }}
  {{- toYaml (default list $pool.pool.args) | nindent 2 }}
  {{- else }}
  {{- include "pdcoord.engineArgs" . | nindent 2 }}
  {{- end }}
env:
  {{- include "pdcoord.engineEnv" . | nindent 2 }}
{{- if not .isWorker }}
ports:
  - {name: {{ ternary "engine" "http" $pool.hasSidecar }}, containerPort: {{ int $pool.enginePort }}}
  {{- if eq $pool.connector "pdcoord" }}
  - {name: kv, containerPort: 14579}
  {{- end }}
  {{- if eq $pool.connector "nixl" }}
  - {name: kv, containerPort: 5600}
  {{- end }}
  {{- if eq $pool.connector "sglang" }}
  - {name: bootstrap, containerPort: 8998}
  {{- end }}
  {{- if eq (include "pdcoord.hasKvEvents" .) "true" }}
  - {name: kv-events, containerPort: 5557}
  - {name: kv-replay, containerPort: 5558}
  {{- end }}
# Loading a large model takes long; half an hour is let pass.
startupProbe:
  httpGet: {path: /health, port: {{ int $pool.enginePort }}}
  periodSeconds: 10
  failureThreshold: 180
livenessProbe:
  httpGet: {path: /health, port: {{ int $pool.enginePort }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /health, port: {{ int $pool.enginePort }}}
  periodSeconds: 5
  timeoutSeconds: 3
# A pod that is to go gets no new requests. Those under way end, and KV that is waited for is fetched, before
# the engine is told to stop; the sidecar stops after it.
lifecycle:
  preStop:
    sleep: {seconds: {{ int $pool.sleep }}}
{{- end }}
resources:
  {{- include "pdcoord.engineResources" . | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  seccompProfile: {type: RuntimeDefault}
  capabilities:
    drop: [ALL]
    {{- if $hasRdma }}
    # RDMA registers memory, which locks it.
    add: [IPC_LOCK]
    {{- end }}
volumeMounts:
  - {name: shm, mountPath: /dev/shm}
  - {name: tmp, mountPath: /tmp}
  - {name: cache, mountPath: /cache}
  - {name: models, mountPath: /models}
  {{- if eq $pool.connector "pdcoord" }}
  - {name: connector, mountPath: /pdcoord, readOnly: true}
  - {name: keys, mountPath: /etc/pdcoord/keys, readOnly: true}
  {{- end }}
  {{- with $pool.pool.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The sidecar as a native sidecar: it starts before the engine and stops after it. */}}
{{- define "pdcoord.sidecarContainer" -}}
{{- $root := .root -}}{{- $pool := .pool -}}
name: pdcoord-sidecar
image: {{ include "pdcoord.image" (dict "root" $root "image" $root.Values.sidecar.image "registry" $root.Values.global.imageRegistry) }}
imagePullPolicy: {{ $root.Values.sidecar.image.pullPolicy }}
restartPolicy: Always
command: [pdcoord-sidecar]
args:
  - --port={{ int $pool.sidecarPort }}
  - --engine=127.0.0.1:{{ int $pool.enginePort }}
  - --dialect={{ get (dict "pdcoord" "pdcoord" "sglang" "sglang") $pool.connector | default "nixlv2" }}
  - --metrics-host=0.0.0.0
  - --metrics-port=9400
  {{- if $root.Values.auth.internalTls.secretName }}
  - --tls-cert-file=/etc/pdcoord/internal-tls/tls.crt
  - --tls-key-file=/etc/pdcoord/internal-tls/tls.key
  - --tls-client-ca-file=/etc/pdcoord/internal-tls/ca.crt
  - --upstream-ca-file=/etc/pdcoord/internal-tls/ca.crt
  - --upstream-cert-file=/etc/pdcoord/internal-tls/tls.crt
  - --upstream-cert-key-file=/etc/pdcoord/internal-tls/tls.key
  - --upstream-tls-name={{ include "pdcoord.internalTlsName" $root }}
  {{- end }}
  {{- if $pool.hasControl }}
  - --control={{ include "pdcoord.controlName" $root }}.{{ $root.Release.Namespace }}.svc:9010
  - --control-key-file=/etc/pdcoord/keys/control
  {{- with include "pdcoord.controlTlsFolder" $root }}
  - --control-ca-file={{ . }}/ca.crt
  - --control-cert-file={{ . }}/tls.crt
  - --control-cert-key-file={{ . }}/tls.key
  {{- end }}
  - --allow-from-control
  {{- end }}
  {{- if $root.Values.auth.planKeysSecret }}
  - --plan-keys-file=/etc/pdcoord/plan-keys/plan-keys
  {{- end }}
  {{- if and $pool.hasControl (eq $pool.connector "pdcoord") }}
  - --kv-agent=127.0.0.1:14579
  {{- if not $pool.isAdopted }}
  - --kv-key-file=/etc/pdcoord/keys/kv
  {{- end }}
  {{- end }}
  {{- if $pool.hasControl }}
  - --transfer-deadline-ms={{ div (mul (int $root.Values.pd.leaseSeconds) 2000) 3 }}
  {{- end }}
  # Told after the engine has ended: no longer than what is left of the pod's time by then.
  - --drain-s={{ int $pool.sidecarDrain }}
  - --log-level={{ $root.Values.sidecar.logLevel }}
  {{- range $root.Values.sidecar.args }}
  - {{ . | quote }}
  {{- end }}
ports:
  - {name: {{ ternary "pdcoord" "http" $pool.isAdopted }}, containerPort: {{ int $pool.sidecarPort }}}
  - {name: sidecar-metrics, containerPort: 9400}
# Of the process alone: the engine starts when this one has succeeded.
startupProbe:
  httpGet: {path: /livez, port: sidecar-metrics, scheme: {{ include "pdcoord.serverScheme" $root | upper }}}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /livez, port: sidecar-metrics, scheme: {{ include "pdcoord.serverScheme" $root | upper }}}
  periodSeconds: 10
  timeoutSeconds: 3
readinessProbe:
  httpGet: {path: /readyz, port: sidecar-metrics, scheme: {{ include "pdcoord.serverScheme" $root | upper }}}
  periodSeconds: 3
  timeoutSeconds: 2
resources:
  {{- toYaml $root.Values.sidecar.resources | nindent 2 }}
securityContext:
  {{- include "pdcoord.containerSecurity" . | nindent 2 }}
  {{- if $pool.isAdopted }}
  # The pod's own security context is not ours to change. The key belongs to root's group, or to the pod's
  # fsGroup, which every container of the pod is in.
  runAsUser: {{ int64 $root.Values.podSecurityContext.runAsUser }}
  runAsGroup: 0
  {{- end }}
volumeMounts:
  {{- if $pool.hasControl }}
  - {name: {{ ternary "pdcoord-keys" "keys" $pool.isAdopted }}, mountPath: /etc/pdcoord/keys, readOnly: true}
  {{- if $root.Values.auth.controlTls.secretName }}
  - {name: pdcoord-control-tls, mountPath: /etc/pdcoord/control-tls, readOnly: true}
  {{- end }}
  {{- end }}
  {{- with include "pdcoord.internalTlsMount" $root }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if $root.Values.auth.planKeysSecret }}
  - {name: pdcoord-plan-keys, mountPath: /etc/pdcoord/plan-keys, readOnly: true}
  {{- end }}
{{- end -}}

{{- define "pdcoord.enginePodSpec" -}}
{{- $root := .root -}}{{- $pool := .pool -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ int $pool.grace }}
{{- include "pdcoord.imagePullSecrets" $root }}
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
  {{- with $pool.vendor.supplementalGroups }}
  supplementalGroups: {{ toJson . }}
  {{- end }}
{{- $hasSidecar := and $pool.hasSidecar (not .isWorker) }}
{{- if or $hasSidecar (eq $pool.connector "pdcoord") }}
initContainers:
  {{- if eq $pool.connector "pdcoord" }}
  - name: connector
    image: {{ include "pdcoord.image" (dict "root" $root "image" $root.Values.transfer.image "registry" $root.Values.global.imageRegistry) }}
    imagePullPolicy: {{ $root.Values.transfer.image.pullPolicy }}
    command: [cp, -r, /opt/pdcoord/., /pdcoord/]
    resources:
      requests: {cpu: 100m, memory: 64Mi}
      limits: {memory: 256Mi}
    securityContext:
      {{- include "pdcoord.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - {name: connector, mountPath: /pdcoord}
  {{- end }}
  {{- if $hasSidecar }}
  - {{- include "pdcoord.sidecarContainer" . | nindent 4 }}
  {{- end }}
{{- end }}
containers:
  - {{- include "pdcoord.engineContainer" . | nindent 4 }}
volumes:
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ default $pool.vendor.shmSize $pool.pool.shmSize }}}
  - name: tmp
    emptyDir: {}
  - name: cache
    emptyDir: {}
  - name: models
    {{- with dig "cache" "persistentVolumeClaim" "" $pool.model }}
    persistentVolumeClaim: {claimName: {{ . | quote }}}
    {{- else }}
    emptyDir: {}
    {{- end }}
  {{- if eq $pool.connector "pdcoord" }}
  - name: connector
    emptyDir: {sizeLimit: 512Mi}
  {{- end }}
  {{- $hasControl := and $pool.hasControl (not .isWorker) }}
  {{- if or $hasControl (eq $pool.connector "pdcoord") }}
  - name: keys
    secret:
      secretName: {{ include "pdcoord.secretName" $root | quote }}
      defaultMode: 0440
  {{- end }}
  {{- with and $hasControl (include "pdcoord.controlTlsVolume" $root) }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with and $hasSidecar (include "pdcoord.internalTlsVolume" $root) }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with and $hasSidecar (include "pdcoord.planKeysVolume" $root) }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $pool.pool.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $pool.pool.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pool.pool.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pool.pool.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A strategic merge patch of a Deployment that runs already. */}}
{{- define "pdcoord.patch" -}}
{{- $root := .root -}}{{- $pool := .pool -}}
spec:
  template:
    metadata:
      labels:
        pdcoord.io/pool: {{ $pool.name | quote }}
        {{- include "pdcoord.engineLabels" . | nindent 8 }}
      annotations:
        {{- include "pdcoord.engineAnnotations" . | nindent 8 }}
    {{- if or $root.Values.pd.enabled $pool.hasSidecar }}
    spec:
      terminationGracePeriodSeconds: {{ int $pool.grace }}
      {{- if $pool.hasSidecar }}
      initContainers:
        - {{- include "pdcoord.sidecarContainer" . | nindent 10 }}
      volumes:
        {{- if $pool.hasControl }}
        - name: pdcoord-keys
          secret:
            secretName: {{ include "pdcoord.secretName" $root | quote }}
            defaultMode: 0440
            items: [{key: control, path: control}]
        {{- with include "pdcoord.controlTlsVolume" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- with include "pdcoord.internalTlsVolume" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with include "pdcoord.planKeysVolume" $root }}
        {{- . | nindent 8 }}
        {{- end }}
      {{- end }}
    {{- end }}
{{- end -}}
