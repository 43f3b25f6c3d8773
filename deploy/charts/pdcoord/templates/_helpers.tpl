{{/* Names, labels and what every pod of this chart has in common. */}}

{{- define "pdcoord.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Headless Service of the control stream. */}}
{{- define "pdcoord.controlName" -}}
{{ include "pdcoord.fullname" . }}-control
{{- end -}}

{{- define "pdcoord.secretName" -}}
{{- default (printf "%s-keys" (include "pdcoord.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{/*
What the coordinator lets in by, and is let in by, where the values name it: a list of {"name", "variable",
"secret", "entry"} in JSON. Each is a volume of that name, mounted whole so that a change arrives.
*/}}
{{- define "pdcoord.accessFiles" -}}
{{- $files := list -}}
{{- with .Values.auth.keysSecret -}}
  {{- $files = append $files (dict "name" "api-keys" "variable" "PDCOORD_KEYS_FILE" "secret" . "entry" "keys.yaml") -}}
{{- end -}}
{{- with .Values.auth.adminKeySecret -}}
  {{- $files = append $files (dict "name" "admin-key" "variable" "PDCOORD_ADMIN_KEY_FILE" "secret" . "entry" "key") -}}
{{- end -}}
{{- with .Values.auth.engineKeySecret -}}
  {{- $files = append $files (dict "name" "engine-key" "variable" "PDCOORD_ENGINE_KEY_FILE" "secret" . "entry" "key") -}}
{{- end -}}
{{- with .Values.auth.planKeysSecret -}}
  {{- $files = append $files (dict "name" "plan-keys" "variable" "PDCOORD_PLAN_KEYS_FILE" "secret" . "entry" "plan-keys") -}}
{{- end -}}
{{- $files | toJson -}}
{{- end -}}

{{/* Keys of plan signatures, where the values name them; an entry of a pod's volumes. */}}
{{- define "pdcoord.planKeysVolume" -}}
{{- with .Values.auth.planKeysSecret -}}
- name: pdcoord-plan-keys
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    items: [{key: plan-keys, path: plan-keys}]
{{- end }}
{{- end -}}

{{/* How clients speak to this release. */}}
{{- define "pdcoord.frontScheme" -}}
{{- ternary "https" "http" (and (eq .Values.gateway.mode "embedded") (ne .Values.gateway.tls.secretName "")) -}}
{{- end -}}

{{- define "pdcoord.serviceAccountName" -}}
{{- default (include "pdcoord.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "pdcoord.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "pdcoord.labels" -}}
{{ include "pdcoord.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{/*
Reference of an image; takes the root, an image's values and the registry for repositories that name no host. The
images of this repository go with global.imageRegistry, engines' with global.engineImageRegistry, Envoy's with none.
*/}}
{{- define "pdcoord.image" -}}
{{- $registry := default "" .registry | trimSuffix "/" -}}
{{- $repository := .image.repository -}}
{{- $first := first (splitList "/" $repository) -}}
{{- $isHosted := and (contains "/" $repository) (or (contains "." $first) (contains ":" $first) (eq $first "localhost")) -}}
{{- if and $registry (not $isHosted) -}}
{{- $repository = printf "%s/%s" $registry $repository -}}
{{- end -}}
{{- $tag := default .root.Chart.AppVersion .image.tag -}}
{{- if hasPrefix "sha256:" $tag -}}
{{- printf "%s@%s" $repository $tag -}}
{{- else -}}
{{- printf "%s:%s" $repository $tag -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.imagePullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Security context of a container; capabilities go as far as RDMA needs. */}}
{{- define "pdcoord.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "pdcoord.terminationGrace" -}}
{{- $sum := add (int .Values.coordinator.drainNoticeSeconds) (int .Values.coordinator.drainSeconds) -}}
{{- if kindIs "invalid" .Values.coordinator.terminationGracePeriodSeconds -}}
{{- add $sum 10 -}}
{{- else -}}
{{- int .Values.coordinator.terminationGracePeriodSeconds -}}
{{- end -}}
{{- end -}}

{{/* Whether requests come in through an Envoy or a Gateway that asks the coordinator. */}}
{{- define "pdcoord.isExtproc" -}}
{{- if ne .Values.gateway.mode "embedded" -}}true{{- end -}}
{{- end -}}

{{/* Spread over zones and nodes, as far as there are any. Takes root and component. */}}
{{- define "pdcoord.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "pdcoord.selectorLabels" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end -}}

{{/* How an HPA, or the one that KEDA makes, grows and shrinks a pool. */}}
{{- define "pdcoord.scalingBehavior" -}}
# An engine takes minutes to load: grow at once, shrink late.
scaleUp: {stabilizationWindowSeconds: 0}
scaleDown:
  stabilizationWindowSeconds: 600
  policies: [{type: Pods, value: 1, periodSeconds: 300}]
{{- end -}}
